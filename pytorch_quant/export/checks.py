"""What has to be true of a model before it is exported."""

from __future__ import annotations

import torch
from torch import nn

from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.qdq import check_exportable


def check_quantizers(model: nn.Module) -> None:
    """Raise where an enabled quantizer cannot become a Q/DQ pair, naming all of them.

    Raises:
        RuntimeError: quantizers without an amax that are not declared dynamic.
        ValueError: an amax that is NaN or infinite, an activation amax of 0, or a format that ONNX
            has no Q/DQ form for.
    """
    active = {n: q for n, q in named_quantizers(model).items() if not q.disabled and q._if_quant}
    uncalibrated = [name for name, q in active.items() if q.needs_amax]
    if uncalibrated:
        raise RuntimeError(
            f"ONNX export of {len(uncalibrated)} uncalibrated quantizer(s): "
            f"{', '.join(uncalibrated)}. Calibrate them, disable() them, or declare them "
            "QuantDescriptor(dynamic=True)"
        )
    weights = weight_quantizers(model)
    for name, quantizer in active.items():
        amax = quantizer.amax
        if amax is not None and not bool(torch.isfinite(amax).all()):
            raise ValueError(f"{name}: amax is not finite; calibrate it again, or disable() it")
        if amax is not None and quantizer not in weights and bool((amax == 0).any()):
            raise ValueError(
                f"{name}: amax is 0, so every value would become 0; its calibration batches held "
                "zeros alone. Calibrate with real inputs, or disable() it"
            )
        if not quantizer.fake_quant:
            raise ValueError(f"{name}: integer codes (fake_quant=False) cannot be exported")
        if not quantizer.dynamic:
            try:
                check_exportable(quantizer.format, quantizer.axis)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
