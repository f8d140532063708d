"""A placement as data: which quantizers a model gets, where each stands, and what stays float."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.tables import aligned

Operand = tuple[int | str, ...]


@dataclass(frozen=True)
class Place:
    """One tensor of one call, or of one layer.

    Attributes:
        module: The qualified name of the module: the layer that is replaced by its quantized form,
            or the module in whose forward the call stands (`""` for the model itself).
        call: The call in that forward, `op#k` such as `add#0`, as `dataflow.Call.site` numbers it;
            None for the operands of a replaced layer.
        operand: What is quantized. Of a layer `("input",)` or `("weight",)`. Of a call the way to a
            tensor among its arguments: `(1,)` is the second positional argument, `(0, 2)` the third
            entry of the list that is the first, `("weight",)` a keyword; `("result",)` is what
            it returns, and `("probabilities",)` the softmax inside of
            `scaled_dot_product_attention`.
    """

    module: str
    call: str | None
    operand: Operand

    @property
    def site(self) -> str:
        """The name that rules match: `layer1.0.conv1`, `layer1.0/add#0`."""
        return self.module if self.call is None else f"{self.module}/{self.call}"


@dataclass(frozen=True)
class PlannedQuantizer:
    """One quantizer.

    Attributes:
        descriptor: How it quantizes.
        places: Where it stands, in the order in which the model gets there; several where one
            tensor has several quantized consumers, or where a concatenation needs one scale. The
            first place holds the module.
        op: What is quantized for: `conv`, `linear`, `matmul`, `add`, `cat`, ...
        reason: Why it is there, in a few words.
    """

    descriptor: QuantDescriptor
    places: tuple[Place, ...]
    op: str
    reason: str


@dataclass(frozen=True)
class LeftFloat:
    """A layer or a call that could be quantized and is not.

    Attributes:
        site: `layer1.0.conv1` or `layer1.0/add#0`.
        op: Its kind.
        reason: Why, naming the rule.
    """

    site: str
    op: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """All that `quantize` is about to do; `print` it for a table.

    Attributes:
        placement: The runtime it is meant for.
        quantizers: In the order of their first places.
        left: What stays float although it could be quantized.
        counts: For each module with quantized calls, how often its forward makes calls of each kind
            that holds a quantizer there: `{"layer1.0": {"add": 1}}`. Another number at run time is
            an error.
        framed: Names of the other modules that make calls of such kinds inside the forward of a
            module of `counts`; they have to be told apart from it.
    """

    placement: str
    quantizers: list[PlannedQuantizer] = field(default_factory=list)
    left: list[LeftFloat] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    framed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return _table(self)


def _table(plan: Plan) -> str:
    """One line for each quantizer, one for each further place of it, then what stays float."""
    rows: list[tuple[str, ...]] = [("site", "operand", "quantizer", "why")]
    for quantizer in plan.quantizers:
        for index, place in enumerate(quantizer.places):
            what = _described(quantizer.descriptor) if index == 0 else "(the same)"
            why = quantizer.reason if index == 0 else f"shared with {_name(quantizer.places[0])}"
            rows.append((place.site or "(model)", _operand(place), what, why))
    lines = [f"placement {plan.placement}: {len(plan.quantizers)} quantizers"]
    lines += aligned(rows) if plan.quantizers else []
    if plan.left:
        lines += ["", f"left float: {len(plan.left)}"]
        lines += aligned(
            [
                ("site", "kind", "why"),
                *((entry.site or "(model)", entry.op, entry.reason) for entry in plan.left),
            ]
        )
    return "\n".join(lines)


def _name(place: Place) -> str:
    return f"{place.site or '(model)'} {_operand(place)}"


def _operand(place: Place) -> str:
    first, *rest = place.operand
    name = f"argument {first}" if isinstance(first, int) else first
    return name + "".join(f"[{index}]" for index in rest)


def _described(descriptor: QuantDescriptor) -> str:
    bits = descriptor.num_bits
    if isinstance(bits, tuple):
        name = f"float E{bits[0]}M{bits[1]}"
    else:
        name = f"{'uint' if descriptor.unsigned else 'int'}{bits}"
    if descriptor.block_size is not None:
        return f"{name}, blocks of {descriptor.block_size} on axis {descriptor.axis}"
    if descriptor.axis is not None:
        return f"{name} per channel, axis {descriptor.axis}"
    return f"{name} dynamic" if descriptor.dynamic else f"{name} per tensor"
