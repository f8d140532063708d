"""The quantizers of a model as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pytorch_quant.analysis.plain_data import Result
from pytorch_quant.analysis.sites import find_sites, is_active, kind_of, lacks_range, unwrapped
from pytorch_quant.axes import Axis
from pytorch_quant.nn.mixins import QuantInputMixin
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.placement.layers import RECURRENT, WEIGHTED
from pytorch_quant.tables import aligned

_FLOAT_KINDS = (*WEIGHTED, *RECURRENT)


@dataclass(frozen=True)
class SummaryRow:
    """One quantizer at one place, or a layer that has none.

    Attributes:
        layer: The layer or call, as rules name it.
        kind: `Conv2d`, `add`, ...
        quantizer: The qualified name of the quantizer; None for a layer without one.
        operand: What it quantizes: `input`, `weight`, `input1` of a call.
        format: The format of its codes, such as `int8`; `float` without one.
        axis: The kept axis; None per tensor.
        block_size: Values along the axis that share an amax; None without blocks.
        amax: The least and the largest amax, real units; None without one.
        amax_count: How many there are.
        state: `quantizes`; with a `fixed` or a `learned` range, or one taken `at run time`;
            `uncalibrated`; `collects` statistics; `off` or `disabled`; `float` without one.
        shared_with: The first of its names, where the same quantizer was listed before.
    """

    layer: str
    kind: str
    quantizer: str | None
    operand: str
    format: str
    axis: Axis
    block_size: int | None
    amax: tuple[float, float] | None
    amax_count: int
    state: str
    shared_with: str | None


@dataclass(frozen=True)
class ModelSummary(Result):
    """What `summary` found; `print` it for a table.

    Attributes:
        rows: In the order of the model.
        quantizers: Quantizers, a shared one once.
        shared: Those that several places share.
        disabled: Those that are disabled, or neither quantize nor clip.
        uncalibrated: Names of those that would quantize and have no range.
        quantized_layers: Layers and calls with a quantizer that is on.
        float_layers: Convolutions, linear and recurrent layers without one.
        parameters: Elements of all parameters.
        quantized_weights: Elements of the weights of layers that a weight quantizer sees; not of
            parameters that a call reads, which only a pass shows.
    """

    rows: list[SummaryRow]
    quantizers: int
    shared: int
    disabled: int
    uncalibrated: list[str]
    quantized_layers: int
    float_layers: int
    parameters: int
    quantized_weights: int

    def __str__(self) -> str:
        table = [("layer", "kind", "operand", "format", "axis", "amax", "state")]
        last = None
        for row in self.rows:
            axis = "-" if row.axis is None else str(row.axis)
            axis += f" x{row.block_size}" if row.block_size is not None else ""
            state = row.state
            if row.shared_with is not None:
                state += f", shared with {row.shared_with}"
            name = (row.layer or "(model)", row.kind) if row.layer != last else ("", "")
            last = row.layer
            table.append((*name, row.operand, row.format, axis, _shown(row), state))
        share = self.quantized_weights / self.parameters if self.parameters else 0.0
        lines = aligned(table)
        lines += [
            "",
            f"{self.quantized_layers} quantized and {self.float_layers} float layers; "
            f"{self.quantizers} quantizers, {self.shared} shared, {self.disabled} off, "
            f"{len(self.uncalibrated)} uncalibrated",
            f"{self.parameters:,} parameters, {share:.1%} of them quantized weights",
        ]
        return "\n".join(lines)


def summary(model: nn.Module) -> ModelSummary:
    """List the layers and quantizers of a model with their formats, ranges and states.

    Nothing is run, and nothing is changed. A model without quantizers gives the list of its
    layers.

    Args:
        model: Any model.

    Raises:
        TypeError: it is no module.
        ValueError: it is a quantizer itself.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"summary takes a module, got {type(model).__name__}")
    model = unwrapped(model)
    sites = find_sites(model)
    first: dict[TensorQuantizer, str] = {}
    rows: dict[str, list[SummaryRow]] = {}
    places: dict[TensorQuantizer, int] = {}
    on: set[str] = set()
    weights: dict[int, int] = {}
    for site in sites:
        for holder in site.holders:
            quantizer = holder.quantizer
            operand = holder.key.strip("_").removesuffix("_quantizer")
            if operand.isdigit() and site.layer is not None:
                # Of a recurrent layer, which has lists of them.
                held = holder.name.split(".")[-2].strip("_").removesuffix("_quantizers")
                operand = f"{held} {operand}"
            if site.layer is None and "/" in site.name:
                call = site.name.rpartition("/")[2].replace("#", "_")
                operand = operand.removeprefix(f"{call}_")
            shared = first.get(quantizer)
            first.setdefault(quantizer, holder.name)
            places[quantizer] = places.get(quantizer, 0) + 1
            rows.setdefault(site.name, []).append(
                _row(site.name, site.kind, holder.name, operand, quantizer, shared)
            )
            if is_active(quantizer):
                on.add(site.name)
        layer = site.layer
        if isinstance(layer, QuantInputMixin) and hasattr(layer, "weights_to_quantize"):
            for quantizer, weight in layer.weights_to_quantize():
                if is_active(quantizer):
                    # A recurrent layer makes its weight anew each time; its quantizer stays.
                    key = weight if isinstance(weight, nn.Parameter) else quantizer
                    weights[id(key)] = weight.numel()
    ordered: list[SummaryRow] = []
    floats = 0
    listed = set()
    for name, module in model.named_modules():
        plain = isinstance(module, _FLOAT_KINDS) and not isinstance(module, QuantInputMixin)
        calls = [site for site in rows if site.startswith(f"{name}/")]
        for site in [name, *calls]:
            if site in rows:
                ordered += rows[site]
                listed.add(site)
        if plain and not calls and name not in rows:
            floats += 1
            kind = kind_of(module)
            ordered.append(
                SummaryRow(name, kind, None, "-", "float", None, None, None, 0, "float", None)
            )
    ordered += [row for site, held in rows.items() if site not in listed for row in held]
    return ModelSummary(
        rows=ordered,
        quantizers=len(first),
        shared=sum(count > 1 for count in places.values()),
        disabled=sum(not is_active(quantizer) for quantizer in first),
        uncalibrated=[name for name, q in named_quantizers(model).items() if lacks_range(q)],
        quantized_layers=len(on),
        float_layers=floats,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        quantized_weights=sum(weights.values()),
    )


def _row(
    layer: str,
    kind: str,
    name: str,
    operand: str,
    quantizer: TensorQuantizer,
    shared: str | None,
) -> SummaryRow:
    amax = None if quantizer.dynamic else quantizer.amax
    span = None
    if amax is not None and amax.numel() and not amax.is_meta:
        span = float(amax.min()), float(amax.max())
    return SummaryRow(
        layer,
        kind,
        name,
        operand,
        "uint8" if quantizer.dynamic else quantizer.format.name,
        quantizer.axis,
        quantizer.block_size,
        span,
        0 if amax is None else amax.numel(),
        _state(quantizer),
        shared,
    )


def _state(quantizer: TensorQuantizer) -> str:
    if quantizer.disabled:
        return "disabled"
    if quantizer.collects:
        return "collects"
    if not is_active(quantizer):
        return "off"
    if lacks_range(quantizer):
        return "uncalibrated"
    if quantizer.dynamic:
        return "at run time"
    if quantizer.learns:
        return "learned"
    return "fixed" if quantizer.fixed else "quantizes"


def _shown(row: SummaryRow) -> str:
    if row.amax is None:
        return "-"
    low, high = row.amax
    if row.amax_count == 1:
        return f"{low:.4g}"
    return f"{low:.4g} to {high:.4g} ({row.amax_count})"
