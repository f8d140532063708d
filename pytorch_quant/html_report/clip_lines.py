"""Where each calibration method would clip what a quantizer sees, and the picture's columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pytorch_quant.calib.histogram import Histogram
from pytorch_quant.calib.methods import MAXIMA_METHODS, WEIGHT_METHODS, search_amax
from pytorch_quant.html_report.seen_values import SeenValues

METHODS: list[tuple[str, str, dict[str, Any]]] = [
    ("max", "max", {}),
    ("percentile 99.99", "percentile", {"percentile": 99.99}),
    ("percentile 99.9", "percentile", {"percentile": 99.9}),
    ("mse", "mse", {}),
    ("lp 2.4", "lp", {"p": 2.4}),
    ("entropy", "entropy", {}),
    ("mean_max", "mean_max", {}),
    ("moving_max", "moving_max", {}),
]
"""What is drawn: label, method, options. `best` is one of them."""

IN_USE = "in use"
COLUMNS = 80


@dataclass(frozen=True)
class ClipLine:
    """One range.

    Attributes:
        label: `in use`, or the method.
        amax: In the unit of the panel; of several channels the median.
        least: Of several channels the least.
        most: Of several channels the largest.
        clipped: The share of the counted values above it, 0 to 1.
    """

    label: str
    amax: float
    least: float
    most: float
    clipped: float


@dataclass(frozen=True)
class Panel:
    """One histogram with its ranges.

    Attributes:
        name: The qualified name of the quantizer.
        sites: The layers and calls that hold it.
        kind: The kind of the first.
        is_weight: It is the weight quantizer of a layer.
        relative: The unit is the largest magnitude of each channel; otherwise it is real.
        counts: Values in each of `COLUMNS` equal columns from 0 to `limit`; empty without values.
        limit: The right end, in the unit of the panel.
        lines: The range in use, if there is one, and those of `METHODS`.
        rows: Channels that are counted.
        channels: Channels in all; 1 per tensor.
        values: Values that the quantizer saw.
        note: What is missing, and why; empty if nothing is.
    """

    name: str
    sites: tuple[str, ...]
    kind: str
    is_weight: bool
    relative: bool
    counts: tuple[float, ...]
    limit: float
    lines: tuple[ClipLine, ...]
    rows: int
    channels: int
    values: int
    note: str


def clip_panels(seen: list[SeenValues], progress: bool) -> list[Panel]:
    """A panel for each quantizer, with one search by each method for all of them."""
    drawn = [s for s in seen if s.histogram is not None and bool(s.histogram.maximum.any())]
    ranged = [s for s in drawn if not s.quantizer.dynamic]
    histograms = [s.histogram for s in ranged if s.histogram is not None]
    formats = [s.quantizer.format for s in ranged]
    found: dict[str, list[tuple[str, Tensor]]] = {s.name: [] for s in seen}
    for label, method, options in tqdm(METHODS, "report: ranges", disable=not progress):
        if method in MAXIMA_METHODS:
            answers = [s.maxima.amax(method) for s in ranged if s.maxima is not None]
        else:
            answers = search_amax(histograms, formats, method, **options)
        for values, amax in zip(ranged, answers, strict=True):
            # A weight has one batch, whose means are its largest.
            if method in WEIGHT_METHODS or not values.is_weight:
                found[values.name].append((label, amax.cpu()))
    return [_panel(values, found[values.name]) for values in seen]


def _panel(seen: SeenValues, methods: list[tuple[str, Tensor]]) -> Panel:
    histogram, note = seen.histogram, ""
    if histogram is None:
        note = "the number of its channels varies" if seen.values else "no batch reached it"
    elif not bool(histogram.maximum.any()):
        note = "it saw only zeros"
    elif seen.quantizer.dynamic:
        note = "its range is taken at run time, for each tensor anew"
    lines: list[ClipLine] = []
    counts: tuple[float, ...] = ()
    limit = 0.0
    relative = seen.channels > 1
    rows = 0
    if histogram is not None and bool(histogram.maximum.any()):
        rows = histogram.channels
        alive = histogram.maximum.cpu() > 0
        unit = histogram.maximum.cpu()[alive].double() if relative else torch.ones(1).double()
        ranges = [] if seen.amax is None else [(IN_USE, seen.amax)]
        for label, amax in [*ranges, *methods]:
            shares = (amax[alive].double() / unit).numpy()
            lines.append(
                ClipLine(
                    label,
                    float(np.median(shares)),
                    float(shares.min()),
                    float(shares.max()),
                    histogram.share_above(amax.to(histogram.counts.device)),
                )
            )
        largest = 1.0 if relative else float(histogram.maximum.max())
        # A range far beyond the values would squeeze them; its line then stands at the end.
        limit = 1.04 * min(max([largest, *(line.amax for line in lines)]), 2 * largest)
        counts = _columns(histogram, alive, unit, limit)
    return Panel(
        seen.name,
        tuple(seen.sites),
        seen.kind,
        seen.is_weight,
        relative,
        counts,
        limit,
        tuple(lines),
        rows,
        seen.channels,
        seen.values,
        note,
    )


def _columns(histogram: Histogram, alive: Tensor, unit: Tensor, limit: float) -> tuple[float, ...]:
    """Counts of all rows in equal columns; a bin that a border cuts is split evenly."""
    counts = histogram.counts.cpu()[alive].double().numpy()
    width = histogram.width[alive].numpy()
    borders = np.linspace(0.0, limit, COLUMNS + 1)
    bins = np.arange(histogram.bins + 1)
    total = np.zeros(COLUMNS)
    for row, bin_width, scale in zip(counts, width, unit.numpy(), strict=True):
        below = np.concatenate([[0.0], np.cumsum(row)])
        total += np.diff(np.interp(borders * scale / bin_width, bins, below))
    return tuple(float(value) for value in total)
