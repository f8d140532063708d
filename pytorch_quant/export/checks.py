"""What has to be true of a model before it is exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pytorch_quant.batches import copied
from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer, uncalibrated_error
from pytorch_quant.plain_pass import plain_forward
from pytorch_quant.qdq import check_exportable


def check_quantizers(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Raise where an enabled quantizer cannot become a Q/DQ pair, naming all of them.

    Those that the export does not meet, such as in a head for training alone, may be in any state.
    Only where some quantizer has a problem, a forward pass is run to find out which are met.

    Args:
        model: The model.
        args: The arguments of the export.

    Raises:
        RuntimeError: quantizers without an amax that are not declared dynamic.
        ValueError: an amax that is NaN or infinite, an activation amax of 0, or a format that ONNX
            has no Q/DQ form for.
    """
    active = {n: q for n, q in named_quantizers(model).items() if not q.disabled and q._if_quant}
    uncalibrated = [name for name, quantizer in active.items() if quantizer.needs_amax]
    weights = weight_quantizers(model)
    problems = {n: _problem(q, q in weights) for n, q in active.items() if n not in uncalibrated}
    if not uncalibrated and not any(problems.values()):
        return
    met = _met(model, args)
    uncalibrated = [name for name in uncalibrated if active[name] in met]
    if uncalibrated:
        raise uncalibrated_error(uncalibrated)
    found = [f"{n}: {problem}" for n, problem in problems.items() if problem and active[n] in met]
    if found:
        raise ValueError("; ".join(found))


def _met(model: nn.Module, args: tuple[Any, ...]) -> set[nn.Module]:
    """The quantizers that a forward pass in eval mode runs."""
    met: set[nn.Module] = set()
    # As the exporter takes them.
    named = dict(args[-1]) if args and isinstance(args[-1], dict) else {}
    given = args[:-1] if args and isinstance(args[-1], dict) else args
    hooks = [
        quantizer.register_forward_pre_hook(lambda quantizer, _: met.add(quantizer))
        for quantizer in named_quantizers(model).values()
    ]
    try:
        with plain_forward(model):
            model(*copied(given), **copied(named))
    finally:
        for hook in hooks:
            hook.remove()
    return met


def _problem(quantizer: TensorQuantizer, is_weight: bool) -> str | None:
    amax = quantizer.amax
    if amax is not None and not bool(torch.isfinite(amax).all()):
        return "amax is not finite; calibrate it again, or disable() it"
    if amax is not None and not is_weight and bool((amax == 0).any()):
        return (
            "amax is 0, so every value would become 0; its calibration batches held zeros alone. "
            "Calibrate with real inputs, or disable() it"
        )
    if not quantizer.fake_quant:
        return "integer codes (fake_quant=False) cannot be exported"
    if quantizer._block_size is not None:
        return "a block quantizer has no Q/DQ form yet; use a per-channel descriptor"
    if not quantizer.dynamic:
        try:
            check_exportable(quantizer.format, quantizer.axis)
        except ValueError as error:
            return str(error)
    return None


# QuantizeLinear-19 brought FP8 and float16, Conv-22 bfloat16.
_FLOOR = {"FP8": 19, "float16": 19, "bfloat16": 22}
_LOWEST = 18


def choose_opset(model: nn.Module, opset: int | None) -> int | None:
    """The operator set to ask the exporter for; None leaves it to the exporter.

    Args:
        model: Its parameters and quantizers decide what the file has to hold.
        opset: What the user asked for.

    Raises:
        ValueError: an operator set that cannot hold the model, or that the exporter does not
            write; float64.
    """
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if "float64" in kinds:
        raise ValueError("QuantizeLinear takes no float64; export model.float()")
    if any(q.num_bits == (4, 3) and not q.disabled for q in named_quantizers(model).values()):
        kinds.add("FP8")
    floors = {kind: _FLOOR[kind] for kind in kinds if kind in _FLOOR}
    if opset is None:
        return 22 if "bfloat16" in kinds else None
    if opset < _LOWEST:
        raise ValueError(
            f"opset={opset} is below {_LOWEST}, the lowest that the exporter writes; leave it out, "
            "or use torch.onnx.export(..., dynamo=False) for an older one"
        )
    for kind, floor in sorted(floors.items()):
        if opset < floor:
            raise ValueError(
                f"opset={opset} is too low for a model in {kind}; use opset={floor} or higher, or "
                "leave it out"
            )
    return opset
