"""What quantization does to each tensor, and each layer to the output."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pytorch_quant.analysis.noise import (
    Noise,
    add_outputs,
    check_measured,
    checked_batches,
    in_turn,
)
from pytorch_quant.analysis.observed import Observed, channel_axis, check_real
from pytorch_quant.analysis.plain_data import Result, shown_db, with_unit
from pytorch_quant.analysis.switches import Switch, Switches, switched
from pytorch_quant.batches import Forward
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.tables import aligned


@dataclass(frozen=True)
class QuantizerError:
    """What one quantizer does to the float tensors that reach it.

    Attributes:
        name: Its qualified name; of a shared one the first.
        format: The format of its codes, such as `int8`.
        sqnr_db: `10 log10(sum(x**2) / sum((y - x)**2))`, dB; NaN if it saw nothing.
        clipped: The share of values with `|x| > amax`, or below 0 where codes are unsigned; with
            a learned clip also of those that it changes.
        codes_used: Distinct codes that occurred / codes of the format. Channels count together. 0
            where it only clips.
        dead_channels: Channels all of whose codes are 0 (the zero point of a dynamic quantizer);
            None where the number of channels varies, or it saw nothing.
        channels: How many channels there are.
        values: How many values it saw; a weight counts once.
    """

    name: str
    format: str
    sqnr_db: float
    clipped: float
    codes_used: float
    dead_channels: int | None
    channels: int | None
    values: int


@dataclass(frozen=True)
class LayerError:
    """What one layer or call does to the output of the model.

    Attributes:
        name: The key of its rule: `layer1.0.conv1`, `layer1.0/add#0`.
        kind: `Conv2d`, `add`, ...
        only_db: SQNR of the output when this alone is quantized, dB.
        without_db: SQNR of the output when all but this are quantized, dB.
        weight_error: `||Q(w) - w||_2 / ||w||_2`; None without a quantized weight.
    """

    name: str
    kind: str
    only_db: float
    without_db: float
    weight_error: float | None


@dataclass(frozen=True)
class LayerErrors(Result):
    """What `layer_errors` found; `print` it for tables.

    Attributes:
        quantizers: A row for each quantizer, in the order of the model.
        layers: A row for each layer and each call, in the order of the model; empty with
            `layers=False`.
        output_db: SQNR of the output when all are quantized, dB; NaN with `layers=False`.
        batches: Batches that were run.
    """

    quantizers: list[QuantizerError]
    layers: list[LayerError]
    output_db: float
    batches: int

    def __str__(self) -> str:
        rows = [("quantizer", "format", "SQNR dB", "clipped", "codes used", "dead channels")]
        for q in self.quantizers:
            dead = "-" if q.channels is None else f"{q.dead_channels} of {q.channels}"
            shares = (f"{q.clipped:.3%}", f"{q.codes_used:.1%}") if q.values else ("-", "-")
            rows.append((q.name, q.format, shown_db(q.sqnr_db), *shares, dead))
        lines = aligned(rows, right=4)
        if self.layers:
            table = [("layer", "kind", "only it, dB", "all but it, dB", "weight error")]
            for row in self.layers:
                weight = "-" if row.weight_error is None else f"{row.weight_error:.3%}"
                both = shown_db(row.only_db), shown_db(row.without_db)
                table.append((row.name or "(model)", row.kind, *both, weight))
            lines += ["", *aligned(table, right=3)]
            lines += ["", f"output with all quantized: {with_unit(self.output_db)}"]
        return "\n".join(lines)


def layer_errors(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    layers: bool = True,
    progress: bool = True,
) -> LayerErrors:
    """Measure what quantization does to each tensor, and what each layer does to the output.

    The reference is the model with all quantizers off, in eval mode. Every figure is a sum over
    all batches, so that memory does not grow with them. Quantizers are measured on the tensors of
    the float pass, weights on themselves. SQNR is the ratio of signal to quantization noise,

        SQNR = 10 log10( sum(x**2) / sum((y - x)**2) )   in dB,

    with `x` the float and `y` the quantized values; infinite without noise. The output is all
    floating-point tensors that the model returns, together. A tensor with a shared quantizer
    counts for each of its consumers alone: a layer that is off sees the float tensor.

    One float pass is run, one with all layers quantized, and two for each layer, batch by batch;
    quantized weights are kept meanwhile. The model comes back as it was.

    Args:
        model: Quantized and calibrated. Disabled quantizers stay off.
        batches: Passed to the model as in `calibrate`, run through once; also an iterator.
        forward: `forward(model, batch)` runs one batch and returns the output.
        layers: Measure layers as well; if false, one pass gives the rows of quantizers alone.
        progress: Show a progress bar.

    Returns:
        A row for each enabled quantizer, and one for each layer and call.

    Raises:
        RuntimeError: uncalibrated quantizers, naming them; a batch on another device; or an
            output whose shape depends on what is quantized.
        TypeError: `model` is no module, `batches` is one tensor or no iterable, or a batch cannot
            be passed on.
        ValueError: no quantizers, none enabled, no batches, no floating-point output, or no finite
            value in it; or NaN in a tensor of the float model, naming the quantizer and the batch.
        Exception: whatever the model and the batches raise.
    """
    checked_batches(batches, "layer_errors")
    with switched(model, forward, "layer_errors") as switches:
        observed = {switch.holder.quantizer: Observed() for switch in switches}
        weights = {name: Noise() for name in switches.sites}
        measured: set[tuple[str, int]] = set()

        def look(switch: Switch, x: Tensor) -> Tensor:
            check_real(switch, x, seen - 1)
            known = isinstance(x, nn.Parameter)
            if (known or switch.is_weight) and (switch.site, id(x)) not in measured:
                # One that a layer computes comes anew each time, which changes no ratio.
                measured.update({(switch.site, id(x))} if known else ())
                weights[switch.site].add(x, switch.quantized(x))
            kind = switches.sites[switch.site].kind
            observed[switch.holder.quantizer].add(switch, x, channel_axis(switch, kind, x))
            return x

        names = list(switches.sites)
        total = Noise()
        only = {name: Noise() for name in names}
        without = {name: Noise() for name in names}
        seen = 0
        runs = 2 + 2 * len(names) if layers else 1
        for batch, done in in_turn(batches, "layer_errors", progress, runs):
            seen += 1
            switches.tap(look)
            expected = _plain_outputs(switches, batch, layers, seen - 1)
            switches.tap(None)
            done()
            if not layers:
                continue
            add_outputs(total, expected, switches.outputs(batch, names), "")
            done()
            for name in names:
                add_outputs(only[name], expected, switches.outputs(batch, [name]), name)
                rest = [other for other in names if other != name]
                add_outputs(without[name], expected, switches.outputs(batch, rest), name)
                done(2)
        if layers:
            check_measured(total, "layer_errors")
        rows = [
            LayerError(
                name,
                site.kind,
                only[name].db,
                without[name].db,
                math.sqrt(weights[name].ratio) if weights[name].signal else None,
            )
            for name, site in switches.sites.items()
        ]
    return LayerErrors(
        _rows(switches, observed),
        rows if layers else [],
        total.db if layers else math.nan,
        seen,
    )


def _plain_outputs(switches: Switches, batch: Any, needed: bool, number: int) -> list[Tensor]:
    switches.use([])
    if needed:
        return switches.reference(batch, number)
    switches.run(batch)
    return []


def _rows(switches: Switches, observed: dict[TensorQuantizer, Observed]) -> list[QuantizerError]:
    names: dict[TensorQuantizer, str] = {}
    for switch in switches:
        names.setdefault(switch.holder.quantizer, switch.holder.name)
    rows = []
    for quantizer, name in names.items():
        found = observed[quantizer]
        channels = found.channels if found.values else None
        rows.append(
            QuantizerError(
                name,
                "uint8 dynamic" if quantizer.dynamic else quantizer.format.name,
                found.noise.db if found.values else math.nan,
                found.clipped / found.values if found.values else 0.0,
                0.0 if found.used is None else float(found.used.double().mean()),
                None if channels is None else int((~channels).sum()),
                None if channels is None else len(channels),
                found.values,
            )
        )
    return rows
