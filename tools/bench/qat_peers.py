"""Fake quantization by torch itself and by the toolkits that happen to be installed.

A peer that cannot be imported is left out. Each is asked for the same: int8, symmetric, a fixed
range, a straight-through gradient.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

FakeQuantize = Callable[[Tensor], Tensor]


def fake_quantizers(amax: Tensor, axis: int | None) -> dict[str, FakeQuantize]:
    """The peers' fake quantization by name.

    Args:
        amax: One value, or the shape of the input with 1 in all axes but `axis`.
        axis: The kept axis, None per tensor.
    """
    found: dict[str, FakeQuantize] = {"torch fake_quantize": _of_torch(amax, axis)}
    for module, make in (("modelopt", _of_modelopt), ("torchao", _of_torchao)):
        if importlib.util.find_spec(module) is not None:
            found[module] = make(amax, axis)
    if importlib.util.find_spec("brevitas") is not None and axis is None:
        found["brevitas"] = _of_brevitas(amax)
    return found


def quantized_models(model: nn.Module, batch: Tensor) -> dict[str, nn.Module]:
    """`model` as peers quantize and calibrate it for training, by name; `model` is left alone.

    Args:
        model: In float, in evaluation mode.
        batch: What it is calibrated with.
    """
    if importlib.util.find_spec("modelopt") is None:
        return {}
    import copy

    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found, unused-ignore]

    quantized = mtq.quantize(
        copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, forward_loop=lambda m: m(batch)
    )
    return {"modelopt": quantized}


def _of_torch(amax: Tensor, axis: int | None) -> FakeQuantize:
    scale = amax / 127
    if axis is None:
        zero = torch.zeros((), dtype=torch.int32, device=amax.device)
        return lambda x: torch.fake_quantize_per_tensor_affine(
            x, scale.reshape(()), zero, -128, 127
        )
    scale = scale.reshape(-1)
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zeros, axis, -128, 127)


def _of_modelopt(amax: Tensor, axis: int | None) -> FakeQuantize:
    from modelopt.torch.quantization.nn import (  # type: ignore[import-not-found, unused-ignore]
        TensorQuantizer,
    )

    quantizer = TensorQuantizer().to(amax.device)
    quantizer.axis = axis
    quantizer.amax = amax
    return quantizer


def _of_torchao(amax: Tensor, axis: int | None) -> FakeQuantize:
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        quant_primitives,
    )

    # Private in newer releases.
    names = ("fake_quantize_affine", "_fake_quantize_affine")
    fake_quantize_affine = next(
        getattr(quant_primitives, name) for name in names if hasattr(quant_primitives, name)
    )
    scale = (amax / 127).reshape(-1)
    zeros = torch.zeros_like(scale, dtype=torch.int32)

    def run(x: Tensor) -> Tensor:
        block = [1 if a == axis else n for a, n in enumerate(x.shape)]
        return fake_quantize_affine(x, tuple(block), scale, zeros, torch.int8, -128, 127)

    return run


def _of_brevitas(amax: Tensor) -> FakeQuantize:
    from brevitas.nn import QuantIdentity  # type: ignore[import-not-found, unused-ignore]
    from brevitas.quant import (  # type: ignore[import-not-found, unused-ignore]
        Int8ActPerTensorFixedPoint,
    )

    # Its range is its own; what is compared is the time. In training it would collect statistics.
    layer = QuantIdentity(Int8ActPerTensorFixedPoint).to(amax.device).eval()

    def run(x: Tensor) -> Tensor:
        result = layer(x)
        return getattr(result, "value", result)

    return run
