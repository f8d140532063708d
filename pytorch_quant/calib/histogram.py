"""An exact histogram of magnitudes whose range doubles as larger values arrive.

The range of a channel is `[0, 2**exponent)`, cut into equal bins. When it doubles, the bins `2j`
and `2j + 1` become bin `j`. No count is ever split, so the histogram of a set of values is the
same whatever the order of the batches, and two histograms of one kind merge exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytorch_quant.calib.counting import LEAST_EXPONENT, coarsened, count_rows, exponent_above
from pytorch_quant.calib.held_state import fill_fields

MAX_BINS = 2**20

WORKING_TYPES = (torch.float16, torch.bfloat16, torch.float32)


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
                maximum = torch.maximum(rows.amax(1), -rows.amin(1))
            maximum = maximum.reshape(self.channels).float()
            if valid is None:
                valid = maximum.isfinite().all()
                if rows.device.type == "cpu" and not valid:
                    bad = rows.numel() - int(rows.isfinite().sum())
                    raise bad_values(False, f"in {bad} of {rows.numel()} values")
            maximum = torch.where(valid, maximum, 0.0)
            exponent = exponent_above(maximum)
            counts = count_rows(rows, self.bins, exponent)
            zeros = rows.shape[1] - rows.count_nonzero(dim=1) if self.skip_zeros else None
            self.add(counts, exponent, maximum, rows.numel(), zeros=zeros, valid=valid)

    def add(
        self,
        counts: Tensor,
        exponent: Tensor,
        maximum: Tensor,
        seen: int | Tensor,
        *,
        zeros: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """Add values that were counted already.

        Args:
            counts: int64, `(channels, bins)`, in the range `[0, 2**exponent)`.
            exponent: int64, `(channels,)`.
            maximum: float32, `(channels,)`.
            seen: Values in all.
            zeros: `(channels,)`, exact zeros among the counts that are to be left out.
            valid: Boolean, shape `()`; where it is false nothing is added.
        """
        with torch.inference_mode(False), torch.no_grad():
            if zeros is not None:
                counts = counts.clone()
                counts[:, 0] -= zeros
            if valid is not None:
                counts, seen = counts * valid, seen * valid
            self.grow(exponent)
            shift = self.exponent - exponent
            if shift.device.type != "cpu" or bool((shift > 0).any()):
                counts = coarsened(counts, shift)
            new = self.counts + counts, torch.maximum(self.maximum, maximum), self.seen + seen
            # One statement without a call: an interrupt comes before or after it.
            self.counts, self.maximum, self.seen = new

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
            made.exponent = exponent_above(made.maximum)
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
            state = (other.counts, other.exponent, other.maximum, other.seen)
            self.add(*(tensor.to(self.counts.device) for tensor in state))

    def share_above(self, amax: Tensor) -> float:
        """The share of the counted values above `amax` `(channels,)`, 0 to 1.

        Inside a bin the values count as evenly spread. Nothing lies above the exact maximum.
        """
        counts, amax = self.counts.cpu().double(), amax.cpu().double()
        total = counts.sum()
        if not total:
            return 0.0
        place = (amax / self.width).clamp(max=self.bins)[:, None]
        left = torch.arange(self.bins, dtype=torch.float64, device=counts.device)
        above = (left + 1 - place).clamp(0, 1)
        above[amax >= self.maximum.cpu()] = 0
        return float((counts * above).sum() / total)

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
        fields = ("counts", "exponent", "maximum", "seen")
        fill_fields(histogram, fields, state, f"a histogram of {histogram.channels} channels")
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

    def grow(self, exponent: Tensor) -> None:
        """Widen the ranges to `[0, 2**exponent)` where they are narrower; no count is lost."""
        exponent = torch.maximum(self.exponent, exponent)
        shift = exponent - self.exponent
        if shift.device.type != "cpu" or bool((shift > 0).any()):
            counts = coarsened(self.counts, shift)
            self.counts, self.exponent = counts, exponent


def flat_as_stored(x: Tensor) -> Tensor:
    """The values in the order of memory: without a copy, and fast to read, if `x` is dense."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)
