"""What a calibration did, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pytorch_quant.tables import aligned


@dataclass(frozen=True)
class QuantizerRange:
    """What calibration gave one quantizer.

    Attributes:
        name: Its qualified name.
        method: The method that chose the amax, such as `mse` or `best: mse`; `fixed` where the
            descriptor did, `dynamic` where the range is taken at run time.
        amax: The amax, real units, shape `()` or per channel; None for a dynamic quantizer.
        seen: Values that the statistics hold; None where there are none.
        clipped: The share of them above the range, `amax * scale_amax`, 0 to 1; None where only
            maxima are known and some lie above it. Inside a bin of the histogram values count as
            evenly spread, so the share is right to the width of a bin.
    """

    name: str
    method: str
    amax: Tensor | None
    seen: int | None = None
    clipped: float | None = None


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did; `print` it for a table.

    Attributes:
        ranges: One row for each quantizer that has a range, in the order of the model.
        unreached: Names of the quantizers that no batch reached; they have no new amax.
        batches: Batches that were run, by all processes together.
    """

    ranges: list[QuantizerRange]
    unreached: list[str] = field(default_factory=list)
    batches: int = 0

    def __str__(self) -> str:
        rows = [("quantizer", "method", "amax", "values", "clipped")]
        for row in self.ranges:
            seen = "-" if row.seen is None else f"{row.seen:,}"
            clipped = "-" if row.clipped is None else f"{row.clipped:.3%}"
            rows.append((row.name, row.method, _shown(row.amax), seen, clipped))
        rows += [(name, "not reached", "-", "-", "-") for name in self.unreached]
        return "\n".join(aligned(rows, right=2))


def _shown(amax: Tensor | None) -> str:
    if amax is None:
        return "at run time"
    if amax.numel() == 1:
        return f"{float(amax):.6g}"
    return f"{float(amax.min()):.6g} to {float(amax.max()):.6g} ({amax.numel()} channels)"
