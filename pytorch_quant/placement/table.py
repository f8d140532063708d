"""A plan as a table to read."""

from __future__ import annotations

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.plan import Place, Plan
from pytorch_quant.tables import aligned


def plan_table(plan: Plan) -> str:
    """One line for each quantizer, one for each further place of it, then what stays float.

    Args:
        plan: Any plan.

    Returns:
        Lines without a final newline.
    """
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
