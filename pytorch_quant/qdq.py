"""Fake quantization as ONNX QuantizeLinear / DequantizeLinear, while an exporter is running.

Both exporters of torch are served: the current one records symbolic ONNX nodes, the TorchScript
one calls the `symbolic` method of an autograd Function. Scales are worked out while the model is
traced and stand in the graph as constants; weights are left as they are, under their own names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pytorch_quant.axes import Axis
from pytorch_quant.exporting import written_opset
from pytorch_quant.fake_quant import compute_scale, quantize_to_codes
from pytorch_quant.formats import FloatFormat, Format, IntFormat, parse_format
from pytorch_quant.traced_values import value_behind
from pytorch_quant.versions import TORCH, needs

AXIS_OPSET = 13
"""The operator set that brought scales along an axis."""

HALF_OPSET = 19
"""The operator set that brought half-precision tensors and FP8 codes."""

# The lowest set that the current exporter has translations for, and the torch that converts down.
_TORCHLIB_OPSET, _CONVERTS_DOWN = 18, (2, 9)


def quantize_dequantize(
    x: Tensor, amax: Tensor, axis: Axis, fmt: Format, *, scale_dtype: torch.dtype
) -> Tensor:
    """Put a Q/DQ pair on `x` into the graph that is being exported.

    A grid that ONNX has no type for (fewer bits, or a narrow range) is an int8 pair behind a clip
    to the range of its codes, which gives the same values. Below operator set 19 the operators take
    float32 only, and the pair of a half-precision tensor stands between two casts.

    Args:
        x: The tensor that is quantized.
        amax: float32, shape `()` or that of `axes.amax_shape`. Where its values are known, the file
            holds finished scales, else the arithmetic that makes them.
        axis: The kept axis, None per tensor.
        fmt: The number format.
        scale_dtype: The dtype whose precision the scale has.

    Raises:
        ValueError: the format or the axis has no ONNX form, or not in the operator set that is
            written; a range of NaN, or of 0 for an activation.
    """
    check_exportable(fmt, axis)
    if x.dtype == torch.float64:
        raise ValueError("QuantizeLinear takes no float64; export model.float()")
    channel_axis = None
    if amax.dim() and isinstance(axis, int):
        channel_axis = axis % x.dim()
    # Weights and channels of zeros have a range of 0 and are exact; an activation was never seen.
    may_be_zero = isinstance(x, nn.Parameter) or channel_axis is not None
    value = value_behind(amax)
    if value is None:
        scale = compute_scale(amax.detach(), fmt, scale_dtype)
        # A zero that is no dead channel stays in the file, where a runtime refuses it.
        scale = positive_scale(scale, fmt) if may_be_zero else scale
        return _recorded(x, scale, channel_axis, fmt)
    with untraced():
        scale = compute_scale(value.detach(), fmt, scale_dtype)
        if not bool(torch.isfinite(scale).all()) or not (may_be_zero or bool(scale.all())):
            raise ValueError(
                f"amax is {float(value.min()):.6g}, from which no scale can be written; "
                "calibrate with real inputs, or disable this quantizer"
            )
        scale = positive_scale(scale, fmt)
        values = tuple(scale.reshape(-1).tolist())
        # To the TorchScript tracer too, this one is a constant.
        scale = torch.tensor(values, device=x.device).reshape(tuple(scale.shape))
    if torch.jit.is_tracing():
        return _TracedQdq.apply(_clipped(x, scale, fmt), values, channel_axis, fmt.name)
    return _recorded(x, scale, channel_axis, fmt)


def _recorded(x: Tensor, scale: Tensor, channel_axis: int | None, fmt: Format) -> Tensor:
    """The nodes as the current exporter records them.

    Args:
        x: The tensor that is quantized.
        scale: float32, broadcasts against `x`; the constants of the nodes where it is no part of
            what is traced.
        channel_axis: The axis of the scales, None per tensor.
        fmt: The number format.
    """
    opset = written_opset()
    _check_conversion(opset)
    check_opset(opset, fmt, channel_axis)
    kind = x.dtype
    if opset is not None and opset < HALF_OPSET:
        x = x.float()
    x = _clipped(x, scale, fmt)
    with nullcontext() if value_behind(scale) is None else untraced():
        scale = scale.reshape(() if channel_axis is None else -1).to(x.dtype)
        zero_point = torch.zeros_like(scale, dtype=torch.float32).to(fmt.storage)
    attributes: dict[str, Any] = {} if channel_axis is None else {"axis": channel_axis}
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero_point), attributes, dtype=fmt.storage, shape=x.shape
    )
    y = torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale, zero_point), attributes, dtype=x.dtype, shape=x.shape
    )
    return y.to(kind)


def check_opset(opset: int | None, fmt: Format, axis: int | None) -> None:
    """Raise where an operator set has no form of a pair; None passes.

    Raises:
        ValueError: FP8 below operator set 19, an axis below 13.
    """
    if opset is None:
        return
    for what, needed, wanted in (
        (f"{fmt.name.upper()} codes", HALF_OPSET, isinstance(fmt, FloatFormat)),
        ("scales along an axis", AXIS_OPSET, axis is not None),
    ):
        if wanted and opset < needed:
            raise ValueError(
                f"{what} need opset {needed}, and torch.onnx.export was asked for {opset}; pass "
                f"opset_version={needed} or more"
            )


def check_exportable(fmt: Format, axis: Axis) -> None:
    """Raise where ONNX has no Q/DQ form.

    Raises:
        ValueError: an integer format wider than 8 bits, E2M1, or several kept axes.
    """
    if isinstance(fmt, IntFormat) and fmt.bits > 8:
        raise ValueError(
            f"{fmt.bits}-bit codes have no Q/DQ form in the opsets that runtimes take; "
            "use 2 to 8 bits or (4, 3), or disable this quantizer before the export"
        )
    if isinstance(fmt, FloatFormat) and fmt.name != "e4m3":
        raise ValueError(
            f"{fmt.name} has no Q/DQ form in the opsets that runtimes take; use (4, 3), or disable "
            "this quantizer before the export"
        )
    if isinstance(axis, tuple):
        raise ValueError(
            f"ONNX keeps one axis at most, got axis={axis}; calibrate this quantizer with one axis"
        )


def _check_conversion(opset: int | None) -> None:
    if opset is not None and opset < _TORCHLIB_OPSET and TORCH < _CONVERTS_DOWN:
        raise ValueError(
            needs(
                f"opset {opset} from torch.onnx.export(..., dynamo=True)",
                _CONVERTS_DOWN,
                f"pass opset_version={_TORCHLIB_OPSET} or more, or dynamo=False",
            )
        )


def positive_scale(scale: Tensor, fmt: Format) -> Tensor:
    """Give a channel of zeros the largest scale of its tensor, as runtimes refuse a scale of 0.

    Where all are 0 it is `1 / bound`. The codes are 0 whatever the scale is.
    """
    # Not max(): its operator has other attributes from set 18 on, and converters mix them up.
    largest = scale.reshape(-1).topk(1).values.reshape(())
    fallback = torch.where(largest > 0, largest, 1.0 / fmt.bound)
    return torch.where(scale > 0, scale, fallback)


def _clipped(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """`x` within the codes of a grid that is narrower than int8; others pass."""
    if not isinstance(fmt, IntFormat) or not (fmt.narrow or fmt.bits < 8):
        return x
    traced = torch.jit.is_tracing() or value_behind(scale) is None
    with nullcontext() if traced else untraced():
        low, high = ((code * scale).to(x.dtype) for code in (fmt.qmin, fmt.qmax))
    if low.dim() or torch.jit.is_tracing():
        return torch.minimum(torch.maximum(x, low), high)
    # The exporter's optimizer makes Clip of Max and Min itself, with bounds that it names after x:
    # those of a second quantizer on the same tensor would get the names of the first.
    return torch.onnx.ops.symbolic("Clip", (x, low, high), dtype=x.dtype, shape=x.shape)


@contextmanager
def untraced() -> Iterator[None]:
    """Compute with real values in the middle of what an exporter traces."""
    if torch.jit.is_tracing():
        with meant_as_constants():
            yield
        return
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


@contextmanager
def meant_as_constants() -> Iterator[None]:
    """The tracer warns of values that it takes as constants, which is what scales are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


class _TracedQdq(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: tuple[float, ...], axis: int | None, name: str
    ) -> Tensor:
        fmt = parse_format(name)
        shape = [-1 if a == axis else 1 for a in range(x.dim())] if axis is not None else []
        with meant_as_constants():
            scale = torch.tensor(scales, dtype=torch.float32, device=x.device).reshape(shape)
        return (quantize_to_codes(x, scale, fmt) * scale).to(x.dtype)

    @staticmethod
    def symbolic(g: Any, x: Any, scales: tuple[float, ...], axis: int | None, name: str) -> Any:
        from torch.onnx import JitScalarType

        check_opset(g.opset, parse_format(name), axis)
        kind = JitScalarType.from_value(x)
        # Before opset 19 the operators take float32 only; the casts stand outside the pair.
        cast = kind.dtype() != torch.float32 and g.opset < HALF_OPSET
        scale = torch.tensor(scales, dtype=torch.float32 if cast else kind.dtype())
        if axis is None:
            scale = scale.reshape(())
        zero_point = torch.zeros_like(scale, dtype=torch.float32).to(parse_format(name).storage)
        constants = [g.op("Constant", value_t=value) for value in (scale, zero_point)]
        attributes = {} if axis is None else {"axis_i": axis}
        value = g.op("Cast", x, to_i=torch.onnx.TensorProtoDataType.FLOAT) if cast else x
        codes = g.op("QuantizeLinear", value, *constants, **attributes)
        y = g.op("DequantizeLinear", codes, *constants, **attributes)
        if cast:
            y = g.op("Cast", y, to_i=kind.onnx_type())
        # The exporter writes convolutions only for weights whose shape it knows.
        y.setType(x.type())
        return y
