"""An exact histogram of magnitudes whose range doubles as larger values arrive.

The range of a channel is `[0, 2**exponent)`, cut into equal bins. When it doubles, the bins `2j`
and `2j + 1` become bin `j`. No count is ever split, so the histogram of a set of values is the
same whatever the order of the batches, and two histograms of one kind merge exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Ranges start here: wide enough for any amax in use, and `bins / range` stays a float32 number.
LEAST_EXPONENT = -100
MAX_BINS = 2**20

WORKING_TYPES = (torch.float16, torch.bfloat16, torch.float32)
# On a CPU, a block of values and its bin numbers fit the second-level cache.
_BLOCK = 1 << 18
# Neighbouring values are counted in separate copies of the histogram. Otherwise the many zeros
# of a post-ReLU tensor wait for one another's store to the first bin, which costs a factor of 2.
_LANES = 4


class CalibrationError(ValueError):
    """Values that cannot be calibrated on, such as NaN."""


def bad_values(negative: bool, where: str) -> CalibrationError:
    """The error for negative values in an unsigned quantizer, or else for NaN and Inf."""
    what, advice = "NaN or Inf", "look for bad data, or for a layer that overflows float16"
    if negative:
        what, advice = "negative values for an unsigned quantizer", "use unsigned=False for it"
    kept = "nothing of that batch was collected, earlier statistics are kept"
    return CalibrationError(f"{what} {where}; {kept}; {advice}")


class Histogram:
    """Counts of `|x|` in equal bins from 0 to a power of two, per tensor or per channel.

    Values are taken as float32, the precision of an amax. Bin `j` counts the values with
    `j * width <= |x| < (j + 1) * width`, exactly. The statistics are ordinary tensors on the
    device of the values, also when the values come from inference mode.

    Attributes:
        bins: Bins of each channel.
        channels: Rows that are counted separately; 1 is per tensor.
        skip_zeros: Exact zeros are not counted.
        counts: int64, shape `(channels, bins)`.
        exponent: int64, shape `(channels,)`; the range of a channel is `[0, 2**exponent)`, where
            `2**exponent` is above the largest magnitude, by a factor of 2 at most.
        maximum: float32, shape `(channels,)`: the exact largest magnitude, real units.
        seen: int64, shape `()`: values seen in all, skipped zeros included.

    Raises:
        ValueError: `bins` or `channels` is out of range.
    """

    def __init__(
        self,
        bins: int = 2048,
        channels: int = 1,
        *,
        skip_zeros: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if not 1 <= bins <= MAX_BINS:
            raise ValueError(f"bins={bins} is out of range; use 1 to {MAX_BINS}")
        if channels < 0:
            raise ValueError(f"channels must be >= 0, got {channels}")
        self.bins = int(bins)
        self.channels = int(channels)
        self.skip_zeros = bool(skip_zeros)
        with torch.inference_mode(False):
            self.counts = torch.zeros(channels, bins, dtype=torch.int64, device=device)
            self.exponent = torch.full_like(self.counts[:, 0], LEAST_EXPONENT)
            self.maximum = torch.zeros(channels, dtype=torch.float32, device=device)
            self.seen = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def width(self) -> Tensor:
        """The width of a bin in real units: float64, shape `(channels,)`, on the CPU."""
        exponent = self.exponent.cpu()
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent) / self.bins

    @property
    def edges(self) -> Tensor:
        """The borders of the bins in real units: float32, shape `(channels, bins + 1)`."""
        width = self.width[:, None]
        edges = width * torch.arange(self.bins + 1, device=width.device)
        return edges.float().to(self.counts.device)

    def update(
        self, x: Tensor, *, maximum: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Count a batch of values. On an accelerator nothing is read back to the host.

        Args:
            x: Any shape per tensor, `(channels, n)` per channel; any dtype and memory format.
            maximum: The largest magnitude of each row, `(channels,)`, if it is known already.
            valid: Boolean, shape `()`; where it is false the batch is left out. By default a
                batch with NaN or Inf is left out.

        Raises:
            CalibrationError: `valid` is not given, and `x` on the CPU holds NaN or Inf. Nothing
                of it is counted.
            ValueError: `x` does not have one row for each channel.
        """
        with torch.inference_mode(False), torch.no_grad():
            rows = self._rows(x)
            if rows.numel() == 0:
                return
            if maximum is None:
                low, high = torch.aminmax(rows, dim=1)
                maximum = torch.maximum(high, -low)
            maximum = maximum.reshape(self.channels).float()
            if valid is None:
                valid = maximum.isfinite().all()
                if rows.device.type == "cpu" and not valid:
                    bad = rows.numel() - int(rows.isfinite().sum())
                    raise bad_values(False, f"in {bad} of {rows.numel()} values")
            maximum = torch.where(valid, maximum, 0.0)
            self._grow(_exponent_above(maximum))
            if rows.device.type == "cpu" and self.channels == 1 and valid:
                counts = _count_in_blocks(rows[0], self.bins, int(self.exponent))[None]
            else:
                counts = _count_rows(rows, self.bins, self.exponent)
            if self.skip_zeros:
                counts[:, 0] -= rows.shape[1] - rows.count_nonzero(dim=1)
            self.counts += counts * valid
            self.maximum = torch.maximum(self.maximum, maximum)
            self.seen += rows.numel() * valid

    @classmethod
    def from_bins(cls, counts: Any, edges: Any, bins: int) -> Histogram:
        """Take over a histogram with bins of its own; a value moves by half a bin at most.

        Args:
            counts: `(B,)`, array or tensor.
            edges: `(B + 1,)`, the borders of the bins in real units, ascending.
            bins: Bins of the result.
        """
        given = torch.as_tensor(counts).round().long()
        borders = torch.as_tensor(edges).double()
        made = cls(bins, device=given.device)
        filled = torch.nonzero(given)[:, 0]
        if filled.numel():
            made.maximum = borders[filled[-1] + 1].float().reshape(1)
            made.exponent = _exponent_above(made.maximum)
            centres = ((borders[:-1] + borders[1:]) / 2 / made.width.to(borders.device)).long()
            made.counts[0].index_add_(0, centres.clamp(0, bins - 1), given)
            made.seen += given.sum()
        return made

    def merge(self, other: Histogram) -> None:
        """Add the values of another histogram to this one, exactly.

        Args:
            other: A histogram of the same kind; any range, any device.

        Raises:
            ValueError: bins, channels or the treatment of zeros differ.
        """
        for field in ("bins", "channels", "skip_zeros"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise ValueError(
                    f"histograms of different formats do not merge: {field}={mine} here, "
                    f"{field}={theirs} there; collect both with the same settings"
                )
        with torch.inference_mode(False), torch.no_grad():
            device = self.counts.device
            exponent = other.exponent.to(device)
            self._grow(exponent)
            self.counts += _coarsened(other.counts.to(device), self.exponent - exponent)
            self.maximum = torch.maximum(self.maximum, other.maximum.to(device))
            self.seen += other.seen.to(device)

    def state(self) -> dict[str, Tensor]:
        """All that the histogram holds, as plain tensors; `from_state` reads it back."""
        return {
            "counts": self.counts.clone(),
            "exponent": self.exponent.clone(),
            "maximum": self.maximum.clone(),
            "seen": self.seen.clone(),
            "skip_zeros": torch.tensor(self.skip_zeros),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Histogram:
        """Build a histogram from the result of `state`.

        Raises:
            ValueError: an entry is missing, or the shapes do not belong together.
        """
        counts = state.get("counts")
        if counts is None or counts.dim() != 2:
            raise ValueError("the state of a histogram holds counts of shape (channels, bins)")
        histogram = cls(
            counts.shape[1],
            counts.shape[0],
            skip_zeros=bool(state.get("skip_zeros", False)),
            device=counts.device,
        )
        with torch.inference_mode(False):
            for field in ("counts", "exponent", "maximum", "seen"):
                empty, value = getattr(histogram, field), state.get(field)
                if value is None or value.shape != empty.shape:
                    found = "nothing" if value is None else f"shape {tuple(value.shape)}"
                    raise ValueError(
                        f"the state of a histogram of {histogram.channels} channels needs {field} "
                        f"of shape {tuple(empty.shape)}, got {found}"
                    )
                empty.copy_(value)
        return histogram

    def __repr__(self) -> str:
        return f"Histogram(bins={self.bins}, channels={self.channels})"

    def _rows(self, x: Tensor) -> Tensor:
        x = x.detach()
        if x.dtype not in WORKING_TYPES:
            x = x.float()
        if self.channels == 1:
            return flat_as_stored(x)[None]
        if x.dim() != 2 or x.shape[0] != self.channels:
            raise ValueError(
                f"a histogram of {self.channels} channels takes values of shape "
                f"({self.channels}, n), got {tuple(x.shape)}"
            )
        return x

    def _grow(self, exponent: Tensor) -> None:
        exponent = torch.maximum(self.exponent, exponent)
        shift = exponent - self.exponent
        if shift.device.type != "cpu" or bool((shift > 0).any()):
            self.counts = _coarsened(self.counts, shift)
        self.exponent = exponent


def flat_as_stored(x: Tensor) -> Tensor:
    """The values in the order of memory: without a copy, and fast to read, if `x` is dense."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)


def _exponent_above(maximum: Tensor) -> Tensor:
    """The least `e` with `2**e > maximum`, not below `LEAST_EXPONENT`."""
    exponent = torch.frexp(maximum).exponent.long()
    return torch.where(maximum > 0, exponent, LEAST_EXPONENT).clamp(min=LEAST_EXPONENT)


def _coarsened(counts: Tensor, shift: Tensor) -> Tensor:
    """The counts after the range of each row has doubled `shift` times."""
    bins = torch.arange(counts.shape[1], device=counts.device)
    target = bins >> shift[:, None].clamp(max=62)
    return torch.zeros_like(counts).scatter_add_(1, target, counts)


def _working_type(bins: int) -> torch.dtype:
    """The type in which `|x| * bins / range` has no rounding error for a float32 `x`."""
    return torch.float32 if bins & (bins - 1) == 0 else torch.float64


def _count_rows(rows: Tensor, bins: int, exponent: Tensor) -> Tensor:
    """Histograms of the rows, without reading anything back from their device."""
    half = exponent // 2
    # In two steps: the reciprocal of the largest range alone is no normal float32 number.
    factor = torch.full_like(exponent, bins, dtype=_working_type(bins))
    factor = torch.ldexp(torch.ldexp(factor, -half), half - exponent)
    index = (rows.to(factor.dtype).abs() * factor[:, None]).long()
    # NaN and Inf give arbitrary numbers here; such a batch is left out, but must stay in bounds.
    index = index.clamp_(0, bins - 1)
    counts = torch.zeros(rows.shape[0], bins, dtype=torch.int64, device=rows.device)
    return counts.scatter_add_(1, index, counts.new_ones(()).expand_as(index))


def _count_in_blocks(x: Tensor, bins: int, exponent: int) -> Tensor:
    """The histogram of a flat tensor on the CPU."""
    factor = bins * 2.0**-exponent
    block = min(_BLOCK, x.numel())
    offsets = _lane_offsets(bins)
    scaled = x.new_empty(block, dtype=_working_type(bins))
    index = x.new_empty(block, dtype=offsets.dtype)
    counts = x.new_zeros(_LANES * 2 * bins, dtype=torch.int64)
    for part in x.split(block):
        n = part.numel()
        if part.dtype == scaled.dtype:
            torch.mul(part, factor, out=scaled[:n])
        else:
            scaled[:n].copy_(part).mul_(factor)
        # Conversion rounds towards 0, so that the bin number carries the sign of the value.
        index[:n].copy_(scaled[:n]).add_(offsets[:n])
        counts += torch.bincount(index[:n], minlength=counts.numel())
    signed = counts.view(_LANES, 2 * bins).sum(0)
    magnitudes = signed[bins:].clone()
    magnitudes[1:] += signed[1:bins].flip(0)
    return magnitudes


@lru_cache(maxsize=4)
def _lane_offsets(bins: int) -> Tensor:
    """Where the bin 0 of each value of a block lies: every lane has `2 * bins` signed bins."""
    dtype = torch.int16 if _LANES * 2 * bins <= 2**15 else torch.int32
    lane = torch.arange(_BLOCK, device="cpu") % _LANES
    return (lane * 2 * bins + bins).to(dtype)
