"""The autograd Functions behind the functions of `pytorch_quant.tensor_quant`, and their checks.

Every `apply` takes the arguments of the function by position; what they mean is said there. The
arithmetic is that of `pytorch_quant.fake_quant`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pytorch_quant import qdq
from pytorch_quant.axes import Axis
from pytorch_quant.exporting import exporting_to_onnx
from pytorch_quant.fake_quant import fake_quantize, quantize, straight_through
from pytorch_quant.formats import FloatFormat, Format, IntFormat, make_format
from pytorch_quant.traced_values import value_behind

# The smallest positive float16: an amax up to here would need a scale that no float16 holds.
_ZERO_AMAX = 2.0**-24
_FLOAT16_MOST = 65504.0


class TensorQuantFunction(torch.autograd.Function):
    """The autograd Function of `tensor_quant`; `apply` takes its arguments, also by position."""

    @staticmethod
    def forward(
        inputs: Tensor,
        amax: Tensor | float,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Codes and inverse scale; see `tensor_quant`."""
        fmt = _integer_format(num_bits, unsigned, narrow_range)
        amax = _checked_amax(amax, inputs)
        if unsigned and inputs.numel() and bool((inputs < 0).any()):
            raise TypeError(
                "Negative values encountered by an unsigned quantizer: minimum "
                f"{float(inputs.min()):.6g}; use unsigned=False for this tensor"
            )
        amax = _without_dust(amax)
        scale = torch.where(amax > 0, fmt.bound / amax, 1.0)
        if inputs.dtype == torch.float16 and bool((scale > _FLOAT16_MOST).any()):
            raise ValueError(
                f"scale is too large for FP16: {float(scale.max()):.6g}, from an amax of "
                f"{float(fmt.bound / scale.max()):.6g}; the largest is {_FLOAT16_MOST:.0f}. "
                "Quantize this tensor in float32"
            )
        codes, _ = quantize(inputs, amax, fmt)
        return codes, scale.to(inputs.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the gradient needs."""
        _save_range(ctx, *inputs[:2])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_scale: Tensor) -> tuple[Any, ...]:
        """Straight through where `|x| <= amax`, zero elsewhere."""
        x, amax = ctx.saved_tensors
        return straight_through(grad, x, amax).to(x.dtype), None, None, None, None


class FakeTensorQuantFunction(torch.autograd.Function):
    """The autograd Function of `fake_tensor_quant`; `apply` takes its arguments."""

    @classmethod
    def apply(
        cls,
        inputs: Tensor,
        amax: Tensor | float,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> Tensor:
        """The fake-quantized tensor; a Q/DQ pair while an ONNX exporter runs."""
        if exporting_to_onnx():
            fmt = _integer_format(num_bits, unsigned, narrow_range)
            return _quantize_dequantize(inputs, amax, fmt)
        return super().apply(inputs, amax, num_bits, unsigned, narrow_range)

    @staticmethod
    def forward(
        inputs: Tensor,
        amax: Tensor | float,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> Tensor:
        """Fake-quantized values; see `fake_tensor_quant`."""
        fmt = _integer_format(num_bits, unsigned, narrow_range)
        return fake_quantize(inputs, _without_dust(_checked_amax(amax, inputs)), fmt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradient needs."""
        _save_range(ctx, *inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Straight through where `|x| <= amax`, zero elsewhere."""
        return straight_through(grad, *ctx.saved_tensors), None, None, None, None


class FakeAffineTensorQuantFunction(torch.autograd.Function):
    """The autograd Function of `fake_affine_tensor_quant`; `apply` takes its arguments."""

    @staticmethod
    def forward(
        inputs: Tensor, min_range: Tensor | float, max_range: Tensor | float, num_bits: int = 8
    ) -> Tensor:
        """Fake-quantized values; see `fake_affine_tensor_quant`."""
        steps = 2.0 * _integer_format(num_bits).bound + 1.0
        low, high = _checked_range(min_range, max_range, inputs)
        scale = (high - low) / steps
        divisor = torch.where(scale > 0, scale, 1.0)
        # The lowest code in steps from zero: minus the zero point of unsigned codes.
        lowest = (low / divisor).round()
        wide = inputs.float() if inputs.dtype.itemsize == 2 else inputs
        y = torch.clamp((wide / divisor).round(), lowest, lowest + steps) * scale
        return torch.where(scale > 0, y, low).to(inputs.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradient needs."""
        x, *limits = inputs[:3]
        ctx.save_for_backward(x, *(_as_float32(limit, x).reshape(()) for limit in limits))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Straight through where `min_range <= x <= max_range`, zero elsewhere."""
        x, low, high = ctx.saved_tensors
        wide = x.float() if x.dtype.itemsize == 2 else x
        return torch.where((wide >= low) & (wide <= high), grad, 0.0), None, None, None


class ScaledE4M3Function(torch.autograd.Function):
    """The autograd Function of `scaled_e4m3`; `apply` takes its arguments."""

    @classmethod
    def apply(cls, input: Tensor, amax: Tensor | float | None, E: int = 4, M: int = 3) -> Tensor:
        """The fake-quantized tensor; a Q/DQ pair while an ONNX exporter runs."""
        if exporting_to_onnx():
            fmt = _e4m3(E, M)
            return _quantize_dequantize(input, fmt.bound if amax is None else amax, fmt)
        return super().apply(input, amax, E, M)

    @staticmethod
    def forward(input: Tensor, amax: Tensor | float | None, E: int = 4, M: int = 3) -> Tensor:
        """Fake-quantized values; see `scaled_e4m3`."""
        fmt = _e4m3(E, M)
        return fake_quantize(input, _checked_amax(fmt.bound if amax is None else amax, input), fmt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradient needs."""
        x, amax, E, M = inputs
        ctx.save_for_backward(x, _as_float32(_e4m3(E, M).bound if amax is None else amax, x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Straight through where `|x| <= amax`, zero elsewhere."""
        return straight_through(grad, *ctx.saved_tensors), None, None, None


def _integer_format(num_bits: int, unsigned: bool = False, narrow_range: bool = False) -> IntFormat:
    fmt = make_format(num_bits, unsigned, narrow_range and not isinstance(num_bits, (tuple, list)))
    if not isinstance(fmt, IntFormat):
        raise TypeError(f"num_bits must be an int here, got {num_bits!r}; use scaled_e4m3 for FP8")
    return fmt


def _e4m3(exponent: int, mantissa: int) -> FloatFormat:
    if (exponent, mantissa) != (4, 3):
        raise TypeError(f"scaled_e4m3 has E=4 and M=3 only, got E={exponent}, M={mantissa}")
    return FloatFormat(4, 3)


def _as_float32(value: Tensor | float, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=x.device).detach()


def _checked_amax(amax: Tensor | float, x: Tensor) -> Tensor:
    _check_floating(x)
    amax = _as_float32(amax, x)
    try:
        fits = torch.broadcast_shapes(amax.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"an amax of shape {tuple(amax.shape)} does not broadcast to an input of shape "
            f"{tuple(x.shape)}; give one value, or one along each kept axis with 1 elsewhere"
        )
    _check_values("amax", amax, least=0.0)
    return amax


def _checked_range(
    min_range: Tensor | float, max_range: Tensor | float, x: Tensor
) -> tuple[Tensor, Tensor]:
    _check_floating(x)
    low, high = _as_float32(min_range, x), _as_float32(max_range, x)
    for name, limit in (("min_range", low), ("max_range", high)):
        if limit.numel() != 1:
            raise ValueError(
                f"{name} must be one value, as the range is per tensor; got shape "
                f"{tuple(limit.shape)}"
            )
        _check_values(name, limit)
    low, high = low.reshape(()), high.reshape(())
    if _readable() and bool(low > high):
        raise ValueError(
            f"min_range={float(low):.6g} is above max_range={float(high):.6g}; swap them"
        )
    return low, high


def _check_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"the input must be floating point, got {x.dtype}; convert it first")


def _check_values(name: str, value: Tensor, least: float = -torch.inf) -> None:
    if not _readable():
        return
    bad = ~value.isfinite() | (value < least)
    if bool(bad.any()):
        wanted = "finite" if least == -torch.inf else f"finite and >= {least:g}"
        raise ValueError(f"{name} must be {wanted}, got {float(value[bad][0]):.6g}")


def _readable() -> bool:
    """Whether tensors have values now; while a graph is being captured they have none."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _without_dust(amax: Tensor) -> Tensor:
    return torch.where(amax > _ZERO_AMAX, amax, 0.0)


def _save_range(ctx: Any, x: Tensor, amax: Tensor | float) -> None:
    ctx.save_for_backward(x, _without_dust(_as_float32(amax, x)))


def _quantize_dequantize(x: Tensor, amax: Tensor | float, fmt: Format) -> Tensor:
    known = value_behind(amax) if isinstance(amax, Tensor) else amax
    # To the tracer of the TorchScript exporter, shapes are values too.
    with nullcontext() if known is None else qdq.untraced():
        value = _checked_amax(amax if known is None else known, x)
        shape = (1,) * (x.dim() - value.dim()) + tuple(int(n) for n in value.shape)
        varying = tuple(a for a, n in enumerate(shape) if n != 1)
        value = value.reshape(shape if varying else ())
    axis: Axis = varying[0] if len(varying) == 1 else varying or None
    return qdq.quantize_dequantize(x, value, axis, fmt, scale_dtype=x.dtype)
