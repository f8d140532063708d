"""Histograms of what each quantizer sees, one row of counts for each range that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant import axes
from pytorch_quant.analysis.noise import in_turn
from pytorch_quant.analysis.switches import Switch, Switches
from pytorch_quant.calib.histogram import CalibrationError, Histogram
from pytorch_quant.calib.maxima import Maxima
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

# Of a quantizer with more channels, this many evenly spaced ones: a search takes 4 ms for each.
MOST_ROWS = 32


class SeenValues:
    """What one quantizer saw.

    Attributes:
        name: The qualified name of the quantizer.
        sites: The layers and calls that hold it.
        kind: The kind of the first.
        is_weight: It is the weight quantizer of a layer.
        quantizer: The quantizer.
        histogram: A row for each of `chosen`; None before any values, or where the number of
            channels varies.
        maxima: The largest magnitudes of each tensor, of the rows of `histogram`; None without it.
        chosen: Which channels or blocks are counted.
        channels: How many there are; 1 per tensor.
        values: How many values it saw in all channels; a parameter counts once.
        amax: The range in use, float32 `(rows,)`, real units; None where it is taken at run time.
    """

    def __init__(self, switch: Switch, kind: str) -> None:
        self.name = switch.holder.name
        self.sites: list[str] = []
        self.kind = kind
        self.is_weight = switch.is_weight
        self.quantizer: TensorQuantizer = switch.holder.quantizer
        self.histogram: Histogram | None = None
        self.maxima: Maxima | None = None
        self.chosen: Tensor | None = None
        self.channels = 0
        self.values = 0
        self.amax: Tensor | None = None
        self._parameters: set[int] = set()
        self._varies = False

    def add(self, switch: Switch, x: Tensor) -> None:
        """Count one tensor.

        Raises:
            CalibrationError: NaN or Inf.
        """
        if isinstance(x, nn.Parameter):
            if id(x) in self._parameters:
                return
            self._parameters.add(id(x))
        if self._varies or x.numel() == 0:
            return
        quantizer, x = switch.quantizer, x.detach()
        # SmoothQuant divides the activation; its quantizer sees the quotient.
        rows = _rows(quantizer.prescaled(x), quantizer)
        self.values += x.numel()
        if self.histogram is None:
            self.channels = len(rows)
            few = min(MOST_ROWS, len(rows))
            self.chosen = torch.linspace(0, len(rows) - 1, few).round().long()
            self.histogram = Histogram(channels=few, device=x.device)
            self.maxima = Maxima((few,), x.device)
            self.amax = self._in_use(quantizer, x, len(rows))
        elif len(rows) != self.channels:
            self._varies, self.histogram, self.maxima = True, None, None
            return
        if len(rows) > MOST_ROWS:
            assert self.chosen is not None
            rows = rows[self.chosen.to(rows.device)]
        try:
            self.histogram.update(rows)
        except CalibrationError as error:
            raise CalibrationError(f"{self.name}: {error}") from error
        assert self.maxima is not None
        self.maxima.update(rows.abs().amax(1).float(), rows.numel())

    def _in_use(self, quantizer: Any, x: Tensor, rows: int) -> Tensor | None:
        amax = quantizer.entering(x).amax
        assert self.chosen is not None
        if amax is None:
            return None
        return amax.detach().float().reshape(-1).cpu().expand(rows)[self.chosen]


def _rows(x: Tensor, quantizer: Any) -> Tensor:
    """The values as a matrix with a row for each range."""
    axis = quantizer.axis
    if quantizer.dynamic or axis is None:
        return x.reshape(1, -1)
    if quantizer.block_size is not None:
        return axes.to_groups(x, axis, quantizer.block_size)
    kept, reduced = axes.kept_axes(axis, x.dim()), axes.reduced_axes(axis, x.dim())
    moved = x.permute(*kept, *reduced)
    return moved.reshape(moved.shape[: len(kept)].numel(), -1)


def seen_values(
    switches: Switches,
    batches: Iterable[Any],
    first: Callable[[Any], None],
    progress: bool,
) -> list[SeenValues]:
    """Run the batches through the float model and count what reaches each quantizer.

    Args:
        switches: The model.
        batches: As in `calibrate`.
        first: Is shown the first batch before it runs.
        progress: Show a progress bar.

    Returns:
        One for each enabled quantizer, a shared one once, in the order of the model.

    Raises:
        CalibrationError: NaN or Inf at a quantizer, naming it.
        ValueError: no batches.
    """
    seen: dict[TensorQuantizer, SeenValues] = {}
    for switch in switches:
        kind = switches.sites[switch.site].kind
        held = seen.setdefault(switch.holder.quantizer, SeenValues(switch, kind))
        if switch.site not in held.sites:
            held.sites.append(switch.site)

    def look(switch: Switch, x: Tensor) -> Tensor:
        seen[switch.holder.quantizer].add(switch, x)
        return x

    switches.use([])
    try:
        for number, (batch, done) in enumerate(in_turn(batches, "report: histograms", progress)):
            if number == 0:
                first(batch)
                switches.tap(look)
            switches.run(batch)
            done()
    finally:
        switches.tap(None)
    return list(seen.values())
