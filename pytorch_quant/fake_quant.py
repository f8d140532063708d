"""Fake quantization as functions.

Symbols: `x` real input, `amax` the magnitude that maps to the largest code, `bound` that code,
`scale = amax / bound` real units per step, `q` integer codes, `y = q * scale`.

    q = saturate(round_half_even(x / scale))

with a true division, as ONNX defines QuantizeLinear. For float32 the codes equal those of ONNX
Runtime bit for bit; for float16 as long as |x / scale| < 2**31, where its x86 kernel wraps around,
while here values saturate, as the specification says. `amax` and `scale` broadcast against `x`, so
per-channel is a matter of shape.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pytorch_quant import blockwise, rematerialized
from pytorch_quant.axes import Axis
from pytorch_quant.exporting import exporting, exporting_to_onnx
from pytorch_quant.formats import Format, IntFormat, parse_format

_HALF_TYPES = (torch.float16, torch.bfloat16)
_TYPES = (torch.float32, torch.float64, *_HALF_TYPES)
_FLOAT16_LEAST, _FLOAT16_MOST = 2.0**-24, 65504.0
_LEAST = 2.0**-149


def _check_type(x: Tensor) -> None:
    if x.dtype not in _TYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
        raise TypeError(f"quantization takes {names} tensors, got {x.dtype}; convert it before")


def compute_scale(amax: Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """`scale = amax / bound`, float32, real units per step.

    For a float16 or bfloat16 `dtype` the scale is rounded to that type first, because that is
    what an exported file of that precision holds. A positive float16 scale stays positive and
    finite; an amax of 0 keeps the scale 0.

    Args:
        amax: Any shape, finite and >= 0.
        fmt: The number format.
        dtype: The dtype of the tensor to be quantized.
    """
    scale = amax.float() / fmt.bound
    if dtype not in _HALF_TYPES:
        return scale
    if dtype == torch.float16:
        limited = scale.clamp(_FLOAT16_LEAST, _FLOAT16_MOST)
        scale = torch.where(scale > 0, limited, scale)
    return scale.to(dtype).float()


def quantize_to_codes(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """The codes `q` of `x`, as float values on the grid of `fmt`.

    Args:
        x: Any shape; float16 and bfloat16 are computed in float32.
        scale: float32, broadcasts against `x`. Where it is 0, the code is 0.
        fmt: The number format.

    Returns:
        float32 (float64 for a float64 `x`), the shape of `x`. NaN stays NaN where `scale` > 0.
    """
    return torch.where(scale > 0, _rounded(x, scale, fmt), 0.0)


def _rounded(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    return fmt.round(_wide(x) / torch.where(scale > 0, scale, 1.0))


def _fake_quantize_values(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    # Multiplying by a scale of 0 gives the 0 that an amax of 0 stands for.
    if torch.compiler.is_compiling() or not blockwise.is_plain(x, scale):
        # A compiler fuses this; what is written in place would have to be undone.
        return (_rounded(x, scale, fmt) * scale).to(x.dtype)
    return _plain_values(x, scale, fmt)


def _plain_values(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    # Modes of torch functions that are active around a model have no part in what is done here.
    with torch._C.DisableTorchFunction():
        y = _values_at_once(x, scale, fmt)
        rematerialized.note(y, x, lambda again: _values_at_once(again, scale, fmt))
        return y


def _values_at_once(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    divisor = torch.where(scale > 0, scale, 1.0)
    if not blockwise.pays(x):
        return _round_in_steps(_wide(x) / divisor, fmt).mul_(scale).to(x.dtype)
    y = torch.empty_like(x)
    for (part, out), (by, step) in blockwise.blocks((x, y), (divisor, scale)):
        if x.dtype in _HALF_TYPES:
            out.copy_(_round_in_steps(part.float().div_(by), fmt).mul_(step))
            continue
        rounded = _round_in_steps(torch.div(part, by, out=out), fmt)
        torch.mul(rounded, step, out=out)
    return y


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF_TYPES else x


def _round_in_steps(steps: Tensor, fmt: Format) -> Tensor:
    """`fmt.round`, in place where it can be."""
    if isinstance(fmt, IntFormat):
        return steps.clamp_(fmt.qmin, fmt.qmax).round_()
    return fmt.round(steps)


def straight_through(grad: Tensor, x: Tensor, amax: Tensor) -> Tensor:
    """`grad` where `|x| <= amax`, zero elsewhere; either of them where `x` is NaN."""
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and (grad.requires_grad or amax.requires_grad))
        or not blockwise.is_plain(grad, x, amax)
        or not x.is_floating_point()
    ):
        return torch.where(_wide(in_backward(x, grad)).abs() <= amax, grad, 0.0)
    with torch._C.DisableTorchFunction():
        return _masked(grad, x, amax)


def in_backward(x: Tensor, grad: Tensor) -> Tensor:
    """`x`, such that a compiler computes in the backward pass what a gradient needs of it.

    A mask that does not depend on the gradient would be computed in the forward pass and kept. On
    the CPU storing it takes longer than all the rest of a compiled fake quantization.
    """
    return torch.where(grad == grad, x, x) if torch.compiler.is_compiling() else x


# Comparing and selecting takes several passes, of which those with a mask of bool are slow on the
# CPU. The gradient of hardtanh takes one, but excludes the bounds: they are moved by one number.
_hardtanh_backward = torch.ops.aten.hardtanh_backward


def _masked(grad: Tensor, x: Tensor, amax: Tensor) -> Tensor:
    if amax.numel() == 1 and amax.device.type == "cpu" and grad.dtype == x.dtype:
        limit = float(amax)
        if limit < math.inf:
            exact = np.float64 if x.dtype == torch.float64 else np.float32
            above = float(np.nextafter(exact(limit), exact(math.inf)))
            return _hardtanh_backward(grad, x, -above, above)
    # On an accelerator the host does not know amax, so that x is divided by it. The quotient of
    # two numbers is above 1 exactly if the first one is the greater one.
    divisor = torch.where(amax > 0, amax, _LEAST)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    above = 1.0 + torch.finfo(wide).eps
    if not (grad.dtype == x.dtype == wide):
        return _hardtanh_backward(grad, _wide(x) / divisor, -above, above).to(grad.dtype)
    if not blockwise.pays(x, grad):
        ratio = x / divisor
        return _hardtanh_backward.grad_input(grad, ratio, -above, above, grad_input=ratio)
    result = torch.empty_like(x)
    for (g, part, out), (by,) in blockwise.blocks((grad, x, result), (divisor,)):
        torch.div(part, by, out=out)
        _hardtanh_backward.grad_input(g, out, -above, above, grad_input=out)
    return result


class _FakeQuantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, amax: Tensor, scale: Tensor, fmt: Format) -> Tensor:
        return _fake_quantize_values(x, scale, fmt)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x, amax, _, _ = inputs
        ctx.save_for_backward(x, amax)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, amax = ctx.saved_tensors
        return straight_through(grad, x, amax), None, None, None


class _FakeQuantizeNow(torch.autograd.Function):
    # Functions that separate the context from `forward` inspect their signature in every call.
    @staticmethod
    def forward(ctx, x: Tensor, amax: Tensor, scale: Tensor, fmt: Format) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, amax)
        return _plain_values(x, scale, fmt)

    backward = _FakeQuantize.backward


class _Quantize(_FakeQuantize):
    @staticmethod
    def forward(x: Tensor, amax: Tensor, scale: Tensor, fmt: Format) -> Tensor:
        return quantize_to_codes(x, scale, fmt)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, amax = ctx.saved_tensors
        return straight_through(grad, x, amax).to(x.dtype), None, None, None


@torch.library.custom_op("pytorch_quant::fake_quantize", mutates_args=())
def _fake_quantize_op(x: Tensor, amax: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return _fake_quantize_values(x, scale, parse_format(fmt))


@_fake_quantize_op.register_fake
def _(x: Tensor, amax: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return torch.empty_like(x)


_fake_quantize_op.register_autograd(
    lambda ctx, grad: (straight_through(grad, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)


def fake_quantize(
    x: Tensor, amax: Tensor, fmt: Format, *, scale_dtype: torch.dtype | None = None
) -> Tensor:
    """Round `x` to the grid of `fmt` and return real values, with a straight-through gradient.

    The gradient passes where `|x| <= amax` and is zero elsewhere (Bengio et al. 2013, clipped as
    in Jacob et al. 2018). Under `torch.export` it stays one node, `pytorch_quant::fake_quantize`.

    Args:
        x: Any shape, floating point.
        amax: float32, finite and >= 0, broadcasts against `x`. No gradient flows to it.
        fmt: The number format.
        scale_dtype: The dtype whose precision the scale has; by default that of `x`.

    Returns:
        The shape and dtype of `x`; 0 where `amax` is 0.

    Raises:
        TypeError: `x` is not floating point, or of a type that has no arithmetic (float8).
    """
    _check_type(x)
    amax = amax.detach()
    scale = compute_scale(amax, fmt, x.dtype if scale_dtype is None else scale_dtype)
    if exporting() and not exporting_to_onnx():
        return _fake_quantize_op(x, amax, scale, fmt.name)
    if torch.compiler.is_compiling() or not blockwise.is_plain(x, amax):
        return _FakeQuantize.apply(x, amax, scale, fmt)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _plain_values(x, scale, fmt)
    return _FakeQuantizeNow.apply(x, amax, scale, fmt)


def torch_fake_quantize(x: Tensor, amax: Tensor, axis: Axis, fmt: Format) -> Tensor:
    """Fake quantization by torch's own `fake_quantize_per_*_affine`.

    It multiplies by the inverse scale, so that at a tie a code may be one step from that of
    `fake_quantize`.

    Args:
        x: Any shape, floating point.
        amax: float32, one value, or one for each entry of `axis`.
        axis: The kept axis, None per tensor.
        fmt: An integer format.

    Raises:
        ValueError: a floating-point format, or several kept axes.
    """
    if not isinstance(fmt, IntFormat):
        raise ValueError(f"torch's fake quantize has integer formats only, got {fmt.name}")
    if isinstance(axis, tuple):
        raise ValueError(f"torch's fake quantize keeps one axis at most, got axis={axis}")
    # The operator divides by the scale; a range of 0 has to give 0, not NaN.
    scale = (amax / fmt.bound).clamp(min=torch.finfo(torch.float32).tiny)
    limits = int(fmt.qmin), int(fmt.qmax)
    if axis is None:
        zero = torch.zeros((), dtype=torch.int32, device=x.device)
        return torch.fake_quantize_per_tensor_affine(x, scale.reshape(()), zero, *limits)
    scale = scale.reshape(-1)
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale, zeros, axis % x.dim(), *limits)


def quantize(x: Tensor, amax: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The integer form: codes and scale, with a straight-through gradient on the codes.

    Args:
        x: Any shape, floating point.
        amax: float32, finite and >= 0, broadcasts against `x`.
        fmt: The number format.

    Returns:
        The codes, and the scale in real units per step (float32). The codes have the dtype of `x`
        where it holds them exactly, else float32.

    Raises:
        TypeError: as `fake_quantize`.
        ValueError: `fmt` is unsigned and `x` holds negative values.
    """
    _check_type(x)
    if not fmt.signed and x.numel() and bool((x < 0).any()):
        raise ValueError(
            f"Negative values encountered by an unsigned quantizer: minimum {float(x.min()):.6g}; "
            "use unsigned=False for this tensor"
        )
    amax = amax.detach()
    scale = compute_scale(amax, fmt, x.dtype)
    codes = _Quantize.apply(x, amax, scale, fmt)
    exact_up_to = {torch.float16: 2.0**11, torch.bfloat16: 2.0**8}.get(x.dtype)
    keeps = exact_up_to is None or max(fmt.qmax, -fmt.qmin) <= exact_up_to
    return (codes.to(x.dtype) if keeps else codes), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """`y = q * scale`, float32."""
    return codes.float() * scale


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes, scale and zero point of the range that `x` itself has.

    The formulas are those of ONNX DynamicQuantizeLinear (operator set 11): the range is widened
    to include 0, `scale = (max - min) / 255`, `zero_point = saturate(round(-min / scale))`. A
    tensor of zeros has scale 1, as in ONNX Runtime; so has one whose range is below float32's
    normal numbers, where its scale is 0.

    Args:
        x: Any shape, floating point.

    Returns:
        Codes as float32 values 0 to 255 in the shape of `x`; scale `()`; zero point `()`.
    """
    wide = x.detach().float()
    if wide.numel():
        low, high = torch.aminmax(wide)
    else:
        low = high = wide.new_zeros(())
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / 255.0
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (0.0 - low / scale).clamp(0.0, 255.0).round()
    codes = ((wide / scale).round() + zero_point).clamp(0.0, 255.0)
    return codes, scale, zero_point


class _FakeQuantizeDynamic(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        codes, scale, zero_point = dynamic_quantize(x)
        return ((codes - zero_point) * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad


def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """Fake quantization with the range of `x` itself; see `dynamic_quantize`.

    The gradient passes everywhere, because the range holds every value.

    Raises:
        TypeError: as `fake_quantize`.
    """
    _check_type(x)
    return _FakeQuantizeDynamic.apply(x)
