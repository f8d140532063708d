"""Fake quantization as ONNX QuantizeLinear / DequantizeLinear, while an exporter is running.

Both exporters of torch are served: the current one records symbolic ONNX nodes, the TorchScript
one calls the `symbolic` method of an autograd Function. Scales become initializers through the
exporters' own constant folding; weights are left as they are, under their own names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.axes import Axis
from pytorch_quant.fake_quant import compute_scale, quantize_to_codes
from pytorch_quant.formats import FloatFormat, Format, IntFormat, parse_format

_HALF_SCALE_OPSET = 19


def exporting_to_onnx() -> bool:
    """Whether an ONNX exporter is running, by whichever route it traces the model.

    The tracer of a strict export takes `torch.onnx.is_in_onnx_export()` for False; it calls this
    function instead.
    """
    return torch.onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result sets, without the second that importing it takes.
exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def quantize_dequantize(
    x: Tensor, amax: Tensor, axis: Axis, fmt: Format, *, scale_dtype: torch.dtype
) -> Tensor:
    """Put a Q/DQ pair on `x` into the graph that is being exported.

    A grid that ONNX has no type for (fewer bits, or a narrow range) is an int8 pair behind a clip
    to the range of its codes, which gives the same values.

    Args:
        x: The tensor that is quantized.
        amax: float32, shape `()` or that of `axes.amax_shape`.
        axis: The kept axis, None per tensor.
        fmt: The number format.
        scale_dtype: The dtype whose precision the scale has.

    Raises:
        ValueError: the format or the axis has no ONNX form.
    """
    check_exportable(fmt, axis)
    if x.dtype == torch.float64:
        raise ValueError("QuantizeLinear takes no float64; export model.float()")
    amax = amax.detach()
    scale = compute_scale(amax, fmt, scale_dtype)
    if isinstance(fmt, IntFormat) and (fmt.narrow or fmt.bits < 8):
        x = _clipped(x, (fmt.qmin * scale).to(x.dtype), (fmt.qmax * scale).to(x.dtype))
    channel_axis = None
    if amax.dim() and isinstance(axis, int):
        channel_axis = axis % x.dim()
    # Weights and channels of zeros have a range of 0 and are exact; an activation was never seen.
    may_be_zero = isinstance(x, nn.Parameter) or channel_axis is not None
    scale = scale.reshape(() if channel_axis is None else -1)
    if torch.jit.is_tracing():
        with meant_as_constants():
            if not bool(torch.isfinite(scale).all()) or not (may_be_zero or bool(scale.all())):
                raise ValueError(
                    f"amax is {float(amax.min()):.6g}, from which no scale can be written; "
                    "calibrate with real inputs, or disable this quantizer"
                )
            values = tuple(positive_scale(scale, fmt).reshape(-1).tolist())
        return _TracedQdq.apply(x, values, channel_axis, fmt.name)
    # A zero that is no dead channel stays in the file, where a runtime refuses it.
    if may_be_zero:
        scale = positive_scale(scale, fmt)
    scale = scale.to(x.dtype)
    attributes: dict[str, Any] = {} if channel_axis is None else {"axis": channel_axis}
    storage = fmt.storage
    zero_point = torch.zeros_like(scale, dtype=torch.float32).to(storage)
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero_point), attributes, dtype=storage, shape=x.shape
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale, zero_point), attributes, dtype=x.dtype, shape=x.shape
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


def positive_scale(scale: Tensor, fmt: Format) -> Tensor:
    """Give a channel of zeros the largest scale of its tensor, as runtimes refuse a scale of 0.

    Where all are 0 it is `1 / bound`. The codes are 0 whatever the scale is.
    """
    largest = scale.max()
    fallback = torch.where(largest > 0, largest, 1.0 / fmt.bound)
    return torch.where(scale > 0, scale, fallback)


def _clipped(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    if low.dim() or torch.jit.is_tracing():
        return torch.minimum(torch.maximum(x, low), high)
    # The exporter's optimizer makes Clip of Max and Min itself, with bounds that it names after x:
    # those of a second quantizer on the same tensor would get the names of the first.
    return torch.onnx.ops.symbolic("Clip", (x, low, high), dtype=x.dtype, shape=x.shape)


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

        kind = JitScalarType.from_value(x)
        # Before opset 19 the operators take float32 only; the casts stand outside the pair.
        cast = kind.dtype() != torch.float32 and g.opset < _HALF_SCALE_OPSET
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
