"""What calibrators ask of a tensor, computed once also where several of them meet it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pytorch_quant.axes import Axis, amax_shape, kept_axes, reduced_axes
from pytorch_quant.calib.counting import (
    RangedCounts,
    count_rows,
    exponent_above,
    range_and_counts,
)
from pytorch_quant.calib.histogram import WORKING_TYPES, flat_as_stored

# Device types on which reading a value back costs nothing.
HOST_TYPES = ("cpu",)
# Values that tell whether a tensor was written to.
_SAMPLED = 64

_shared: WeakTensorKeyDictionary | None = None


class Observation:
    """The range of one tensor, and its histograms on demand. It does not hold the tensor.

    Attributes:
        numel: Values of the tensor.
        shape: That of an amax.
        device: Where the tensor is.
        on_host: Reading a value back costs nothing.
        host: There, per tensor: the range as plain numbers, and the histogram if
            one was asked for. After a forward pass the caches hold nothing of ours, and every
            operation on a small tensor costs ten times what it costs in a loop.
    """

    def __init__(self, x: Tensor, axis: Axis, bins: int | None = None) -> None:
        values = _working(x)
        self.numel = x.numel()
        self.device = x.device
        self.on_host = x.device.type in HOST_TYPES
        self.shape = amax_shape(x.shape, axis)
        self.host: RangedCounts | None = None
        self._axis = axis
        self._counts: dict[int, tuple[Tensor, Tensor]] = {}
        self._bins = bins
        self._ranges: tuple[Tensor, Tensor] | None = None
        if axis is None:
            flat = flat_as_stored(values)
            if self.on_host:
                self.host = _range(flat) if bins is None else range_and_counts(flat, bins)
                return
            low, high = torch.aminmax(flat)
        elif reduced := reduced_axes(axis, x.dim()):
            # Two reductions: torch.aminmax along a dimension takes ten times as long.
            low, high = values.amin(reduced, keepdim=True), values.amax(reduced, keepdim=True)
        else:
            low = high = values
        self._ranges = (
            torch.maximum(high, -low).float().reshape(self.shape),
            low.float().amin(),
        )

    def host_counts(self, bins: int) -> RangedCounts | None:
        """The histogram as it is on the CPU, if it was made with these bins; None else."""
        return self.host if self._bins == bins else None

    @property
    def maximum(self) -> Tensor:
        """The largest magnitudes: float32, `shape`; NaN where there is NaN."""
        return self._both()[0]

    @property
    def least(self) -> Tensor:
        """The least value: float32, `()`."""
        return self._both()[1]

    def _both(self) -> tuple[Tensor, Tensor]:
        if self._ranges is None:
            assert self.host is not None
            self._ranges = torch.tensor(self.host.magnitude), torch.tensor(self.host.low)
        return self._ranges

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
            counted = self.host_counts(bins)
            if counted is not None and counted.counts is not None:
                return counted.counts[None], torch.tensor([counted.exponent])
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
    same = mark is None or mark == held
    if version != x._version or not same:
        made = {}
        _shared[x] = (x._version, mark, made)
    if axis not in made:
        made[axis] = Observation(x, axis, bins)
    return made[axis]


def _range(flat: Tensor) -> RangedCounts:
    low, high = torch.aminmax(flat)
    return RangedCounts(low.item(), high.item(), flat.numel(), None, 0)


def _fingerprint(x: Tensor) -> list[float] | None:
    """Some of the values of a tensor on the CPU, from all over it, at a cost that is constant."""
    if x.device.type != "cpu" or x.layout != torch.strided:
        return None
    x = x.detach()
    step = -(-x.numel() // _SAMPLED)
    if x.is_contiguous():
        return x.view(-1)[::step].tolist()
    # A flat view does not exist: the places of the same values along each axis.
    return x[torch.unravel_index(torch.arange(0, x.numel(), step), x.shape)].tolist()


def _working(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype in WORKING_TYPES else x.float()
