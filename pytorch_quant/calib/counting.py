"""Counting magnitudes into equal bins of a power-of-two range: exact, and near memory speed."""

from __future__ import annotations

import math
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


@dataclass
class RangedCounts:
    """The range and the histogram of a flat tensor.

    Attributes:
        low, high: The least and the largest value; NaN where there is NaN.
        counts: int64 `(B,)`; None where the tensor holds NaN or Inf.
        exponent: The range is `[0, 2**exponent)`.
    """

    low: float
    high: float
    counts: Tensor | None
    exponent: int


def range_and_counts(x: Tensor, bins: int) -> RangedCounts:
    """The range and the histogram of a flat tensor on the CPU, not empty, in one pass over it."""
    with torch.inference_mode(False), torch.no_grad():
        found = RangedCounts(math.inf, -math.inf, x.new_zeros(bins, dtype=torch.int64), 0)
        block = min(_BLOCK, x.numel())
        offsets = _lane_offsets(bins)
        scaled = x.new_empty(block, dtype=_working_type(bins))
        index = x.new_empty(block, dtype=offsets.dtype)
        lanes = x.new_zeros(_LANES * 2 * bins, dtype=torch.int64)
        found.exponent = LEAST_EXPONENT
        for part in x.split(block):
            # While the block is in the cache: its range, which a pass of its own would read again.
            low, high = (float(value) for value in torch.aminmax(part))
            found.low, found.high = min(found.low, low), max(found.high, high)
            if not (math.isfinite(low) and math.isfinite(high)):
                return RangedCounts(low, high, None, 0)
            exponent = _exponent_above(max(high, -low))
            if exponent > found.exponent:
                assert found.counts is not None
                found.counts += _magnitudes(lanes)
                found.counts = _widened(found.counts, exponent - found.exponent)
                found.exponent = exponent
                lanes.zero_()
            n = part.numel()
            factor = bins * 2.0**-found.exponent
            if part.dtype == scaled.dtype:
                torch.mul(part, factor, out=scaled[:n])
            else:
                scaled[:n].copy_(part).mul_(factor)
            # Conversion rounds towards 0, so that the bin number carries the sign of the value.
            index[:n].copy_(scaled[:n]).add_(offsets[:n])
            lanes += torch.bincount(index[:n], minlength=lanes.numel())
        assert found.counts is not None
        found.counts += _magnitudes(lanes)
        return found


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
    return coarsened(counts[None], torch.tensor([shift]))[0] if shift else counts


@lru_cache(maxsize=4)
def _lane_offsets(bins: int) -> Tensor:
    """Where the bin 0 of each value of a block lies: every lane has `2 * bins` signed bins."""
    dtype = torch.int16 if _LANES * 2 * bins <= 2**15 else torch.int32
    lane = torch.arange(_BLOCK, device="cpu") % _LANES
    return (lane * 2 * bins + bins).to(dtype)
