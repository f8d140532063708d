"""What calibrators ask of a tensor, computed once also where several of them meet it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pytorch_quant.axes import Axis, amax_shape, kept_axes, reduced_axes
from pytorch_quant.calib.counting import count_rows, exponent_above, range_and_counts
from pytorch_quant.calib.histogram import WORKING_TYPES, flat_as_stored

# Values that tell whether a tensor was written to.
_SAMPLED = 64

_shared: WeakTensorKeyDictionary | None = None


class Observation:
    """The range of one tensor, and its histograms on demand. It does not hold the tensor.

    Attributes:
        numel: Values of the tensor.
        maximum: float32, `amax_shape(x.shape, axis)`: the largest magnitudes; NaN where there is
            NaN.
        least: float32, `()`: the least value.
        device: Where the tensor is.
    """

    def __init__(self, x: Tensor, axis: Axis, bins: int | None = None) -> None:
        values = _working(x)
        self.numel = x.numel()
        self.device = x.device
        self._axis = axis
        self._counts: dict[int, tuple[Tensor, Tensor]] = {}
        if axis is None and bins is not None and x.device.type == "cpu":
            self._count_and_range(flat_as_stored(values), bins)
            return
        if axis is None:
            low, high = torch.aminmax(flat_as_stored(values))
        elif reduced := reduced_axes(axis, x.dim()):
            # Two reductions: torch.aminmax along a dimension takes ten times as long.
            low, high = values.amin(reduced, keepdim=True), values.amax(reduced, keepdim=True)
        else:
            low = high = values
        self.least = low.float().amin()
        self.maximum = torch.maximum(high, -low).float().reshape(amax_shape(x.shape, axis))

    def _count_and_range(self, flat: Tensor, bins: int) -> None:
        found = range_and_counts(flat, bins)
        self.least = torch.tensor(found.low)
        self.maximum = torch.tensor(max(found.high, -found.low))
        if found.counts is not None:
            self._counts[bins] = found.counts[None], torch.tensor([found.exponent])

    def rows(self, x: Tensor) -> Tensor:
        """The values of the tensor with one row for each kept entry, `(C, n)`."""
        values = _working(x)
        if self._axis is None:
            return flat_as_stored(values)[None]
        order = kept_axes(self._axis, x.dim()) + reduced_axes(self._axis, x.dim())
        return values.permute(order).reshape(self.maximum.numel(), -1)

    def counts(self, x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
        """The histogram `(C, bins)` of the tensor, and the exponents `(C,)` of its ranges."""
        if bins not in self._counts:
            maximum = self.maximum.reshape(-1)
            exponent = exponent_above(torch.where(maximum.isfinite(), maximum, 0.0))
            self._counts[bins] = count_rows(self.rows(x), bins, exponent), exponent
        return self._counts[bins]


@contextmanager
def shared_observations() -> Iterator[None]:
    """Let calibrators that meet the very same tensor share what it costs, inside the block."""
    global _shared
    outer, _shared = _shared, WeakTensorKeyDictionary()
    try:
        yield
    finally:
        _shared = outer


def observe(x: Tensor, axis: Axis, bins: int | None = None) -> Observation:
    """The observation of `x`, not empty; one that was made before if `x` is unchanged since.

    Writes count that autograd counts. Of others, such as through `x.data` or a NumPy view, those
    show on the CPU that change any of 64 values spread over `x`; on an accelerator, where looking
    would stop the device, none do.

    Args:
        x: Any shape, any dtype.
        axis: The kept axis.
        bins: Of the histogram that will be asked for, if one will be.
    """
    if _shared is None or x.is_inference():
        # A tensor of inference mode does not tell whether it was written to.
        return Observation(x, axis, bins)
    version, held, made = _shared.get(x, (None, None, {}))
    mark = _fingerprint(x)
    same = mark is None or (held is not None and torch.equal(mark, held))
    if version != x._version or not same:
        made = {}
        _shared[x] = (x._version, mark, made)
    if axis not in made:
        made[axis] = Observation(x, axis, bins)
    return made[axis]


def _fingerprint(x: Tensor) -> Tensor | None:
    """Some of the values of a tensor on the CPU, from all over it, at a cost that is constant."""
    if x.device.type != "cpu" or x.layout != torch.strided:
        return None
    x = x.detach()
    step = -(-x.numel() // _SAMPLED)
    if x.is_contiguous():
        return x.view(-1)[::step].clone()
    # A flat view does not exist: the places of the same values along each axis.
    return x[torch.unravel_index(torch.arange(0, x.numel(), step), x.shape)]


def _working(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype in WORKING_TYPES else x.float()
