"""Fake quantization whose range is trained: the gradients of LSQ and of PACT.

The forward pass is that of `fake_quant.fake_quantize`, so that training changes nothing about what
is simulated. With `s = amax / bound`, `v = x / s` and the codes `qmin` to `qmax`:

LSQ (Esser et al. 2020, arXiv 1902.08153, eq. 3 and 5):

    dy/ds = round(v) - v  where qmin < v < qmax;  qmin where v <= qmin;  qmax where v >= qmax
    dy/dx = 1             where qmin < v < qmax;  0 elsewhere

The gradient of `s` is multiplied by `1 / sqrt(N * qmax)` (section 2.2). N is the number of values
that share the scale: of a weight, or of one example of an activation, as in appendix A; the size
of the batch is not in it, so that gradients can be accumulated over parts of a batch. What arrives
at `amax` is `bound` times that, with which one step of SGD moves `s` as in the paper.

PACT (Choi et al. 2018, arXiv 1805.06085, eq. 3), with both signs for a signed format:

    dy/damax = 1  where x >= amax;  -1 where x <= -amax (signed);  0 elsewhere
    dy/dx    = 1  where neither;  0 elsewhere, and where an unsigned x <= 0
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pytorch_quant.exporting import exporting
from pytorch_quant.fake_quant import compute_scale, fake_quantize, in_backward
from pytorch_quant.formats import Format

RangeMethod = Literal["lsq", "pact"]
RANGE_METHODS: tuple[RangeMethod, ...] = ("lsq", "pact")

_LEAST_SCALE = 2.0**-24


def learned_fake_quantize(
    x: Tensor,
    amax: Tensor,
    fmt: Format,
    method: RangeMethod,
    *,
    weight: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """Fake-quantize `x`, with gradients to `x` and to `amax`.

    Where no gradient of `amax` is asked for, and in an export, it is `fake_quantize` itself.

    Args:
        x: Any shape, floating point.
        amax: float32, finite and > 0, broadcasts against `x`.
        fmt: The number format.
        method: `lsq` or `pact`.
        weight: `x` has no axis of examples.
        scale_dtype: The dtype whose precision the scale has; by default that of `x`.

    Returns:
        The shape and dtype of `x`.
    """
    dtype = x.dtype if scale_dtype is None else scale_dtype
    learns = torch.is_grad_enabled() and amax.requires_grad
    if not learns or exporting():
        return fake_quantize(x, amax, fmt, scale_dtype=dtype)
    return _LearnedFakeQuantize.apply(x, amax, fmt, method, weight, dtype)


def positive(amax: Tensor, bound: float) -> Tensor:
    """The range that a trained value stands for: its magnitude, at least `bound * 2**-24`.

    An optimizer may step across zero; the magnitude then grows again on the other side. Below the
    least value the gradient passes, so that a range comes back from there.

    Args:
        amax: Any values.
        bound: The code that the range maps to.
    """
    # The gradient of abs is 0 at 0, from where a range could not come back.
    magnitude = torch.where(amax < 0, -amax, amax)
    return magnitude + (bound * _LEAST_SCALE - magnitude).clamp(min=0.0).detach()


def values_per_range(x: Tensor, amax: Tensor, weight: bool) -> int:
    """N of LSQ: how many values of `x`, of one example if it is no weight, share one scale."""
    count = x.numel() // max(amax.numel(), 1)
    own_first_axis = amax.dim() == x.dim() and amax.shape[0] > 1 if x.dim() else True
    if not weight and x.dim() > 1 and not own_first_axis:
        count = count // max(x.shape[0], 1)
    return max(count, 1)


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        amax: Tensor,
        fmt: Format,
        method: RangeMethod,
        weight: bool,
        scale_dtype: torch.dtype,
    ) -> Tensor:
        return fake_quantize(x, amax, fmt, scale_dtype=scale_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, amax, ctx.fmt, ctx.method, ctx.weight, ctx.scale_dtype = inputs
        ctx.save_for_backward(x, amax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, amax = ctx.saved_tensors
        x = in_backward(x, grad)
        gradient = _lsq if ctx.method == "lsq" else _pact
        inside, outer = gradient(grad, x, amax, ctx.fmt, ctx.weight, ctx.scale_dtype)
        given = torch.where(inside, grad, 0.0) if ctx.needs_input_grad[0] else None
        return given, outer.sum_to_size(amax.shape), None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _lsq(
    grad: Tensor, x: Tensor, amax: Tensor, fmt: Format, weight: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    v = _wide(x) / compute_scale(amax, fmt, dtype)
    inside = (v > fmt.qmin) & (v < fmt.qmax)
    slope = torch.where(inside, fmt.round(v) - v, v.clamp(fmt.qmin, fmt.qmax))
    factor = fmt.bound * (values_per_range(x, amax, weight) * fmt.qmax) ** -0.5
    return inside, _wide(grad) * slope * factor


def _pact(
    grad: Tensor, x: Tensor, amax: Tensor, fmt: Format, weight: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    above, below = wide >= amax, wide <= (-amax if fmt.signed else 0.0)
    slope = above.to(wide.dtype) - (below.to(wide.dtype) if fmt.signed else 0.0)
    return ~(above | below), _wide(grad) * slope
