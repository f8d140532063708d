"""Counting magnitudes into equal bins of a power-of-two range: exact, and near memory speed."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Ranges start here: wide enough for any amax in use, and `bins / range` stays a float32 number.
LEAST_EXPONENT = -100
# On a CPU, a block of values and its bin numbers fit the second-level cache.
_BLOCK = 1 << 18
# Neighbouring values are counted in separate copies of the histogram. Otherwise the many zeros
# of a post-ReLU tensor wait for one another's store to the first bin, which costs a factor of 2.
_LANES = 4


def exponent_above(maximum: Tensor) -> Tensor:
    """The least `e` with `2**e > maximum`, not below `LEAST_EXPONENT`: int64."""
    exponent = torch.frexp(maximum).exponent.long()
    return torch.where(maximum > 0, exponent, LEAST_EXPONENT).clamp(min=LEAST_EXPONENT)


def coarsened(counts: Tensor, shift: Tensor) -> Tensor:
    """The counts `(C, B)` after the range of each row has doubled `shift` `(C,)` times."""
    bins = torch.arange(counts.shape[1], device=counts.device)
    target = bins >> shift[:, None].clamp(max=62)
    return torch.zeros_like(counts).scatter_add_(1, target, counts)


def count_rows(rows: Tensor, bins: int, exponent: Tensor) -> Tensor:
    """The histogram of each row of magnitudes, without reading anything back from the device.

    Args:
        rows: `(C, n)`, floating point. Where a row holds NaN or Inf its counts mean nothing.
        bins: `B`.
        exponent: `(C,)`; the range of a row is `[0, 2**exponent)`.

    Returns:
        int64, `(C, B)`.
    """
    if rows.device.type == "cpu" and len(rows) == 1 and bool(rows.numel()):
        found = range_and_counts(rows[0], bins)
        if found.counts is not None and found.exponent <= int(exponent):
            return _widened(found.counts, int(exponent) - found.exponent)[None]
    return _count_anywhere(rows, bins, exponent)


def _count_anywhere(rows: Tensor, bins: int, exponent: Tensor) -> Tensor:
    half = exponent // 2
    # In two steps: the reciprocal of the largest range alone is no normal float32 number.
    factor = torch.full_like(exponent, bins, dtype=_working_type(bins))
    factor = torch.ldexp(torch.ldexp(factor, -half), half - exponent)
    index = (rows.to(factor.dtype).abs() * factor[:, None]).long()
    # NaN and Inf give arbitrary numbers here; such a batch is left out, but must stay in bounds.
    index = index.clamp_(0, bins - 1)
    counts = torch.zeros(rows.shape[0], bins, dtype=torch.int64, device=rows.device)
    return counts.scatter_add_(1, index, counts.new_ones(()).expand_as(index))


def _working_type(bins: int) -> torch.dtype:
    """The type in which `|x| * bins / range` has no rounding error for a float32 `x`."""
    return torch.float32 if bins & (bins - 1) == 0 else torch.float64


@dataclass(frozen=True)
class RangedCounts:
    """The range and the histogram of one or more flat tensors on the CPU.

    Attributes:
        low, high: The least and the largest value; NaN where there is NaN.
        numel: Values in all.
        counts: int64 `(B,)`; None where there is NaN or Inf. Never written to.
        exponent: The range is `[0, 2**exponent)`.
    """

    low: float
    high: float
    numel: int
    counts: Tensor | None
    exponent: int

    @property
    def magnitude(self) -> float:
        """The largest magnitude."""
        return max(self.high, -self.low)

    def plus(self, other: RangedCounts) -> RangedCounts:
        """That of the values of both."""
        assert self.counts is not None and other.counts is not None
        exponent = max(self.exponent, other.exponent)
        return RangedCounts(
            min(self.low, other.low),
            max(self.high, other.high),
            self.numel + other.numel,
            _widened(self.counts, exponent - self.exponent)
            + _widened(other.counts, exponent - other.exponent),
            exponent,
        )


def range_and_counts(x: Tensor, bins: int) -> RangedCounts:
    """The range and the histogram of a flat tensor on the CPU, not empty, in one pass over it."""
    offsets = _lane_offsets(bins)
    scaled, index = _scratch(_working_type(bins), offsets.dtype)
    low, high = math.inf, -math.inf
    exponent = LEAST_EXPONENT
    # Of the present range, by lane; and of the narrower ones before it.
    lanes: Tensor | None = None
    counts: Tensor | None = None
    for part in x.split(_BLOCK):
        # While the block is in the cache: its range, which a pass of its own would read again.
        least, most = (float(bound) for bound in torch.aminmax(part))
        low, high = min(low, least), max(high, most)
        if not (math.isfinite(least) and math.isfinite(most)):
            return RangedCounts(least, most, x.numel(), None, 0)
        needed = _exponent_above(max(most, -least))
        if needed > exponent:
            counts = _joined(counts, lanes)
            counts = None if counts is None else _widened(counts, needed - exponent)
            exponent, lanes = needed, None
        n = part.numel()
        values, places = (scaled, index) if n == _BLOCK else (scaled[:n], index[:n])
        factor = bins * 2.0**-exponent
        if part.dtype == values.dtype:
            torch.mul(part, factor, out=values)
        else:
            values.copy_(part).mul_(factor)
        # Conversion rounds towards 0, so that the bin number carries the sign of the value.
        places.copy_(values).add_(offsets if n == _BLOCK else offsets[:n])
        counted = torch.bincount(places, minlength=_LANES * 2 * bins)
        lanes = counted if lanes is None else lanes.add_(counted)
    return RangedCounts(low, high, x.numel(), _joined(counts, lanes), exponent)


_held = threading.local()


def _scratch(scaled: torch.dtype, index: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for a block of scaled values and of bin numbers, kept: fresh memory has to be mapped."""
    kept: dict[tuple[torch.dtype, torch.dtype, int], tuple[Tensor, Tensor]]
    kept = _held.__dict__.setdefault("rooms", {})
    key = scaled, index, _BLOCK
    if key not in kept:
        with torch.inference_mode(False):
            kept[key] = (
                torch.empty(_BLOCK, dtype=scaled, device="cpu"),
                torch.empty(_BLOCK, dtype=index, device="cpu"),
            )
    return kept[key]


def _joined(counts: Tensor | None, lanes: Tensor | None) -> Tensor | None:
    if lanes is None:
        return counts
    magnitudes = _magnitudes(lanes)
    return magnitudes if counts is None else counts + magnitudes


def _exponent_above(maximum: float) -> int:
    return max(math.frexp(maximum)[1], LEAST_EXPONENT) if maximum > 0 else LEAST_EXPONENT


def _magnitudes(lanes: Tensor) -> Tensor:
    """Counts by magnitude from those of the signed bins of every lane."""
    signed = lanes.view(_LANES, -1).sum(0)
    bins = signed.numel() // 2
    magnitudes = signed[bins:]
    magnitudes[1:] += signed[1:bins].flip(0)
    return magnitudes


def _widened(counts: Tensor, shift: int) -> Tensor:
    if not shift:
        return counts
    bins = counts.numel()
    if bins % 2 or shift > 62 or bins % (1 << shift):
        return coarsened(counts[None], torch.tensor([shift]))[0]
    widened = torch.zeros_like(counts)
    torch.sum(counts.view(-1, 1 << shift), 1, out=widened[: bins >> shift])
    return widened


@lru_cache(maxsize=4)
def _lane_offsets(bins: int) -> Tensor:
    """Where the bin 0 of each value of a block lies: every lane has `2 * bins` signed bins."""
    dtype = torch.int16 if _LANES * 2 * bins <= 2**15 else torch.int32
    with torch.inference_mode(False):
        return _offsets(bins).to(dtype)


def _offsets(bins: int) -> Tensor:
    lane = torch.arange(_BLOCK, device="cpu") % _LANES
    return lane * 2 * bins + bins
