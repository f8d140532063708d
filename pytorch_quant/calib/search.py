"""The search for amax: pure functions from histograms and a number format to amax.

All functions take a batch of histograms: `counts` `(H, B)` of magnitudes in equal bins that start
at 0, `width` `(H,)` or `(H, 1)`, the width of a bin in real units, and optionally `maximum`
`(H,)`, the exact largest magnitude, which no result exceeds. They return `(H,)` float32, real
units: 0 for a histogram without counts, above 0 for any other unless its maximum is 0.

A candidate `i` is the amax `i * width`, the upper edge of the first `i` bins. Below, lengths are
in bins: bin `j` has its centre at `j + 1/2`, and with `m` the magnitudes of a format and `bound`
the largest of them, candidate `i` represents the values `m * i / bound`. The search runs on the
CPU in float64, so that equal counts give equal bits on every machine of one kind.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from pytorch_quant.formats import Format, IntFormat

# Values in one step of a vectorised evaluation, 8 MiB of float64: few steps, little memory.
_STEP = 1 << 20
# An error this small beside the value may be rounding of the search itself.
_EXACT = 1e-10
# Up to this power float64 holds the errors of every format in units of the histogram.
_STEEP = 30.0


def check_percentile(percentile: float) -> None:
    """Refuse what is no percentile.

    Raises:
        TypeError: it is no number.
        ValueError: it is outside [0, 100].
    """
    # NumPy scalars are numbers too.
    number: object = percentile
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"percentile={percentile!r} is no number; use one in [0, 100]")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile={percentile} is out of range; use a value in [0, 100]")


def percentile_amax(
    counts: Tensor, width: Tensor, percentile: float, *, maximum: Tensor | None = None
) -> Tensor:
    """The magnitude that `percentile` percent of the values do not exceed.

    Inside a bin the values count as evenly spread. At least one value is covered.

    Args:
        counts: `(H, B)`.
        width: `(H,)` or `(H, 1)`.
        percentile: In percent, 0 to 100.
        maximum: `(H,)`.

    Raises:
        TypeError: `percentile` is no number.
        ValueError: `percentile` is outside [0, 100].
    """
    check_percentile(percentile)
    host = counts.cpu().double()
    below = torch.nn.functional.pad(host.cumsum(1), (1, 0))
    target = (below[:, -1:] * (percentile / 100)).clamp(min=1.0)
    # Rounding may lift the target past the total.
    target = torch.minimum(target, below[:, -1:])
    index = torch.searchsorted(below[:, 1:].contiguous(), target).clamp(max=host.shape[1] - 1)
    inside = (target - below.gather(1, index)) / host.gather(1, index).clamp(min=1.0)
    return _to_amax((index + inside)[:, 0], counts, width, maximum)


def mse_amax(
    counts: Tensor,
    width: Tensor,
    fmt: Format,
    *,
    start_bin: int = 128,
    stride: int = 1,
    maximum: Tensor | None = None,
) -> Tensor:
    """The amax with the least mean squared error of the fake-quantized values: `lp_amax`, p = 2."""
    return lp_amax(counts, width, fmt, 2.0, start_bin=start_bin, stride=stride, maximum=maximum)


def lp_amax(
    counts: Tensor,
    width: Tensor,
    fmt: Format,
    p: float = 2.4,
    *,
    start_bin: int = 128,
    stride: int = 1,
    maximum: Tensor | None = None,
) -> Tensor:
    """The amax with the least mean `|y - x|**p` of the fake-quantized values.

    The values of a bin sit at its centre; values above amax are clipped to it. Among equal errors
    the largest candidate wins. The larger `p`, the more the largest errors weigh.

    Args:
        counts: `(H, B)`.
        width: `(H,)` or `(H, 1)`.
        fmt: The number format.
        p: Above 0; 2 is the mean squared error.
        start_bin: The least candidate, in bins. The last bin with counts is always a candidate,
            and the only one if it lies below.
        stride: Bins between candidates.
        maximum: `(H,)`.

    Raises:
        ValueError: `p` is not above 0, or `start_bin` or `stride` is below 1.
    """
    if not 0 < p < float("inf"):
        raise ValueError(f"p={p} is out of range; use a finite number above 0")
    p, host = float(p), counts.cpu().double()
    ends, valid = _candidates(host, start_bin, stride)
    if p > _STEEP:
        bins = _steep_minimum(host, ends, valid, fmt, p)
    else:
        # The unit of length does not matter to the search, but to what float64 can hold. By a
        # power of two the division is exact.
        unit = 1.0 if p == 2 else 2.0 ** math.ceil(math.log2(host.shape[1]))
        errors = _summed_errors(host, ends, fmt, p, unit)
        # What an error of 0 may come out as.
        rounding = _EXACT ** max(p, 2.0) * (host @ (_centres(host) / unit).pow(p))
        bins = _largest_minimum(errors, valid, ends, rounding)
    return _to_amax(bins, counts, width, maximum)


def entropy_amax(
    counts: Tensor,
    width: Tensor,
    fmt: Format,
    *,
    start_bin: int = 128,
    stride: int = 1,
    maximum: Tensor | None = None,
) -> Tensor:
    """The amax whose quantized distribution diverges least from the real one.

    The method of S. Migacz, "8-bit inference with TensorRT", GTC 2017. For candidate `i`, P is
    the first `i` bins with the counts of all later bins added to the last of them. Q is the same
    bins without that addition, merged into one segment for each magnitude of the format; the mass
    of a segment is spread evenly over those of its bins that have counts. The candidate with the
    least Kullback-Leibler divergence of Q from P, both normalised, wins; among equal ones the
    largest. It is infinite where P has mass and Q has none.

    An integer format with `L` magnitudes has equal segments: segment `l` starts at bin
    `ceil(l * i / L)`. A floating-point format has the cells that round to each magnitude.

    Below `L` bins no two bins share a segment: the divergence then knows nothing of rounding, and
    such candidates do not compare with the others. So the least candidate is the larger of
    `start_bin` and `L`. If the histogram has no more bins than that with counts, rounding costs
    nothing and nothing is clipped.

    Zeros are exact in every format and say nothing about the range, so the search takes the count
    of bin 1 for that of bin 0, as TensorRT does.

    Args:
        counts: `(H, B)`.
        width: `(H,)` or `(H, 1)`.
        fmt: The number format.
        start_bin: The least candidate, in bins; see above.
        stride: Bins between candidates.
        maximum: `(H,)`.

    Raises:
        ValueError: `start_bin` or `stride` is below 1.
    """
    host = counts.cpu().double()
    levels = len(fmt.magnitudes())
    ends, valid = _candidates(host, start_bin, stride, levels)
    bins = _occupied(host)
    if levels < host.shape[1]:
        searched = host.clone()
        searched[:, 0] = host[:, 1]
        divergences = _divergences(searched, ends, fmt)
        found = _largest_minimum(divergences, valid, ends, host.new_full((len(host),), 1e-12))
        # Without the counts of bin 0 nothing may be left to search.
        bins = torch.where(searched.sum(1) > 0, found, bins)
    return _to_amax(bins, counts, width, maximum)


def _occupied(counts: Tensor) -> Tensor:
    """The number of bins up to the last one with counts, `(H,)`; 0 without counts."""
    numbers = torch.arange(1, counts.shape[1] + 1, device=counts.device)
    return torch.where(counts > 0, numbers, 0).amax(1)


def _centres(counts: Tensor) -> Tensor:
    return torch.arange(counts.shape[1], dtype=counts.dtype, device=counts.device) + 0.5


def _candidates(
    counts: Tensor, start_bin: int, stride: int, levels: int = 1
) -> tuple[Tensor, Tensor]:
    """The candidates of all histograms `(K,)`, and which of them each histogram has `(H, K)`."""
    if start_bin < 1 or stride < 1:
        raise ValueError(f"start_bin and stride must be at least 1, got {start_bin} and {stride}")
    start = max(start_bin, levels)
    numbers = torch.arange(1, counts.shape[1] + 1, device=counts.device)
    last = _occupied(counts)[:, None]
    ends = torch.unique(torch.cat([numbers[start - 1 :: stride], last.flatten()]))
    ends = ends[(ends >= 1) & (ends <= last.max())]
    regular = (ends >= start) & ((ends - start) % stride == 0)
    return ends, (regular & (ends <= last)) | (ends == last)


def _largest_minimum(objective: Tensor, valid: Tensor, ends: Tensor, rounding: Tensor) -> Tensor:
    """The largest valid candidate with the least objective.

    Objectives that differ by `rounding` `(H,)` or by 1e-9 of their value count as equal.
    """
    objective = torch.where(valid, objective, torch.inf)
    if not ends.numel():
        return objective.new_zeros(objective.shape[0])
    least = objective.amin(1, keepdim=True)
    bound = least + 1e-9 * least.abs() + rounding[:, None]
    return torch.where(valid & (objective <= bound), ends, 0).amax(1)


def _to_amax(bins: Tensor, counts: Tensor, width: Tensor, maximum: Tensor | None) -> Tensor:
    amax = bins * width.cpu().double().reshape(-1)
    if maximum is not None:
        amax = torch.minimum(amax, maximum.cpu().double().reshape(-1))
    return amax.float().to(counts.device)


def _cell_starts(ends: Tensor, fmt: Format) -> Tensor:
    """The first bin of each magnitude's cell but the lowest, `(K, M - 1)`.

    A bin belongs to the magnitude that its centre rounds to; a centre on the border, as far from
    both, to the upper one. In integers: midpoints of all formats are multiples of 1/1024.
    """
    magnitudes = torch.from_numpy(fmt.magnitudes())
    borders = ((magnitudes[1:] + magnitudes[:-1]) * 512).long()
    bound = int(fmt.bound) * 1024
    return -torch.div(bound - 2 * ends[:, None] * borders, 2 * bound, rounding_mode="floor")


def _segment_starts(ends: Tensor, fmt: Format) -> Tensor:
    """The borders of the segments of each candidate, `(K, L + 1)`, from 0 to the candidate."""
    if isinstance(fmt, IntFormat):
        levels = len(fmt.magnitudes())
        products = torch.arange(levels + 1, device=ends.device) * ends[:, None]
        return -torch.div(-products, levels, rounding_mode="floor")
    first = torch.zeros_like(ends)[:, None]
    return torch.cat([first, _cell_starts(ends, fmt), ends[:, None]], 1)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[:, index]` for a table `(H, B)` and any shape of index."""
    return table.index_select(1, index.flatten()).view(table.shape[0], *index.shape)


def _chunks(ends: Tensor, size: int) -> tuple[Tensor, ...]:
    return ends.split(max(1, _STEP // max(1, size)))


def _steep_minimum(counts: Tensor, ends: Tensor, valid: Tensor, fmt: Format, p: float) -> Tensor:
    """The largest valid candidate with the least summed `|error|**p`, `(H,)`, for any power.

    In logarithms, with the errors of each candidate in units of the largest of them, so that
    nothing overflows and what underflows does not count: row by row, which takes longer.
    """
    found = torch.zeros(len(counts), dtype=ends.dtype)
    for row, (held, own) in enumerate(zip(counts, valid, strict=True)):
        filled, mine = held > 0, ends[own]
        centres = _centres(held[None])[filled]
        logs = []
        for part in _chunks(mine, len(centres)) if len(centres) else ():
            step = part[:, None].double() / fmt.bound
            error = (fmt.round(centres / step) * step - centres).abs_()
            # As small as an error of 0 may come out; all such candidates are equal.
            error.clamp_(min=_EXACT * float(centres[-1]))
            largest = error.amax(1, keepdim=True)
            summed = (error / largest).pow_(p) @ held[filled]
            logs.append(summed.log() + p * largest[:, 0].log())
        if logs:
            logged = torch.cat(logs)
            # A relative difference is a difference of logarithms.
            found[row] = mine[logged <= logged.amin() + 1e-9 * p].amax()
    return found


def _summed_errors(
    counts: Tensor, ends: Tensor, fmt: Format, p: float, unit: float = 1.0
) -> Tensor:
    """The summed `|error|**p` of each candidate, `(H, K)`, of errors in `unit` bins.

    The error of every bin under every candidate is the same for all histograms, so one matrix
    product evaluates them all. It is faster than prefix sums over the cells of the format, works
    for every format, and subtracts no large sums from one another.
    """
    centres = _centres(counts)
    errors = []
    for part in _chunks(ends, counts.shape[1]):
        step = part[:, None].double() / fmt.bound
        error = fmt.round(centres / step) * step - centres
        if unit != 1.0:
            error /= unit
        power = error.square_() if p == 2 else error.abs_().pow_(p)
        errors.append(counts @ power.T)
    return torch.cat(errors, 1) if errors else counts.new_zeros(counts.shape[0], 0)


def _divergences(counts: Tensor, ends: Tensor, fmt: Format) -> Tensor:
    """KL(P || Q) of each candidate, `(H, K)`, in nats.

    With `p` the counts divided by their sum, `o` the mass beyond the candidate, `e` the mass of
    its last bin, `S` and `n` the mass and the number of nonzero bins of a segment, and `C` the
    mass of all segments, the divergence is

        sum(p log p) - e log e + (e + o) log(e + o) - sum(S log(S / n)) - o log(S / n)_last + log C

    where the first sum runs over the bins of the candidate.
    """
    total = counts.sum(1, keepdim=True).clamp(min=1.0)
    pad = torch.nn.functional.pad
    mass = pad(counts.cumsum(1), (1, 0))
    filled = pad((counts > 0).double().cumsum(1), (1, 0))
    share = counts / total
    plogp = pad(torch.special.xlogy(share, share).cumsum(1), (1, 0))
    divergences = []
    for part in _chunks(ends, counts.shape[0] * (len(fmt.magnitudes()) + 1)):
        starts = _segment_starts(part, fmt)
        segment = _look_up(mass, starts).diff(dim=2).div_(total[:, :, None])
        level = segment / _look_up(filled, starts).diff(dim=2).clamp_(min=1.0)
        # Empty segments: any positive number will do, because 0 multiplies its logarithm.
        level = level.clamp_(min=1e-300).log_()
        covered = _look_up(mass, part)
        beyond = (total - covered) / total
        edge = _look_up(share, part - 1)
        divergence = (
            _look_up(plogp, part)
            - torch.special.xlogy(edge, edge)
            + torch.special.xlogy(edge + beyond, edge + beyond)
            - (segment * level).sum(2)
            - beyond * level[:, :, -1]
            + torch.log(covered / total)
        )
        missing = (edge == 0) & (beyond > 0)
        divergences.append(torch.where(missing, torch.inf, divergence))
    return torch.cat(divergences, 1) if divergences else counts.new_zeros(counts.shape[0], 0)
