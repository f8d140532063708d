"""The parts of the page about placement and about the exported file."""

from __future__ import annotations

from collections import Counter, defaultdict

from pytorch_quant.analysis.summary import SummaryRow
from pytorch_quant.html_report.exported import Exported
from pytorch_quant.html_report.gathered import Gathered
from pytorch_quant.html_report.markup import Cell, Html, code, joined, table, tag
from pytorch_quant.html_report.sections import missing
from pytorch_quant.placement.plan import Plan

_GRADES = {"error": "bad", "warning": "fair", "performance": "good"}


def placement(found: Gathered) -> Html:
    """The quantizers that the model has, why, and what stays float."""
    held = found.table
    explained = tag(
        "p",
        f"{held.quantized_layers} quantized and {held.float_layers} float layers; "
        f"{held.quantizers} quantizers, {held.shared} shared, {held.disabled} off.",
    )
    reasons = {} if found.plan is None else _reasons(found.plan, held.rows)
    left = {} if found.plan is None else {entry.site: entry.reason for entry in found.plan.left}
    header = ["place", "kind", "format", "axis", "amax", "state"]
    header += [] if found.plan is None else ["why"]
    rows = []
    for i, row in enumerate(held.rows):
        axis = "-" if row.axis is None else str(row.axis)
        axis += f" x{row.block_size}" if row.block_size is not None else ""
        state = row.state
        if row.shared_with is not None:
            state += f", shared with {row.shared_with}"
        place = joined([code(row.layer or "(model)"), f" {row.operand}" if row.quantizer else ""])
        cells: list[object] = [place, row.kind, row.format, axis, _amax(row), state]
        if found.plan is not None:
            why = reasons.get(i) if row.quantizer else left.get(row.layer)
            cells.append(why or "-")
        rows.append(cells)
    parts = [explained, table("Quantizers and float layers", header, rows)]
    if found.plan is None:
        parts.append(missing("Pass ", code("float_model="), " for the reason of each."))
        return joined(parts)
    listed = {row.layer for row in held.rows}
    others = [entry for entry in found.plan.left if entry.site not in listed]
    if others:
        parts.append(tag("h3", "Calls left in float"))
        shown = [(code(e.site or "(model)"), e.op, e.reason) for e in others]
        parts.append(table("Calls left in float", ("call", "kind", "why"), shown))
    return joined(parts)


def _reasons(plan: Plan, rows: list[SummaryRow]) -> dict[int, str]:
    """The reason of each row of a quantizer; those of a call are matched in order."""
    planned: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for quantizer in plan.quantizers:
        for place in quantizer.places:
            planned[place.site].append((str(place.operand[0]), quantizer.reason))
    there = Counter(row.layer for row in rows if row.quantizer)
    used: Counter[str] = Counter()
    reasons = {}
    for i, row in enumerate(rows):
        if row.quantizer is None:
            continue
        at = planned[row.layer]
        named = dict(at).get(row.operand)
        if named is None and len(at) == there[row.layer]:
            named = at[used[row.layer]][1]
        used[row.layer] += 1
        if named is not None:
            reasons[i] = named
    return reasons


def _amax(row: SummaryRow) -> Cell:
    if row.amax is None:
        return Cell("-", number=True)
    low, high = row.amax
    if row.amax_count == 1:
        return Cell(f"{low:.4g}", low, number=True)
    return Cell(f"{low:.3g} to {high:.3g} ({row.amax_count})", number=True)


def prediction(found: Gathered) -> Html:
    """Which operators run on integers."""
    exported = found.exported
    if exported.prediction is None:
        return _failed(exported)
    predicted = exported.prediction
    count = len(predicted.rows) - len(predicted.float_rows)
    share = predicted.share
    total = f"{count} of {len(predicted.rows)} operators run on 8-bit codes in {predicted.target}"
    total += "" if share is None else f", {share:.1%} of the multiply-accumulates"
    ordered = [*predicted.float_rows, *(row for row in predicted.rows if row.int8)]
    rows = [
        (
            code(row.node),
            row.op,
            tag(
                "span",
                row.runs_in,
                class_=f"mark {'good' if row.int8 else 'bad'}",
            ),
            Cell("-" if not row.macs else f"{row.macs / 1e6:.2f}", row.macs, number=True),
            row.reason,
        )
        for row in ordered
    ]
    header = ("node", "op", "runs in", "million MACs", "why")
    explained = tag("p", f"{total}, by its documented fusion rules. What stays float comes first.")
    return joined([explained, table("Predicted int8", header, rows)])


def lint(found: Gathered) -> Html:
    """Rules of the runtime that the file breaks."""
    exported = found.exported
    if exported.export is None:
        return _failed(exported)
    parts: list[Html] = []
    if not exported.findings:
        parts.append(tag("p", f"No findings: the file keeps all rules for {exported.target}."))
    else:
        rows = [
            (
                joined(
                    [
                        tag("span", f"{f.rule} {f.severity}", class_=f"mark {_GRADES[f.severity]}"),
                        " ",
                        code(f.node),
                    ]
                ),
                f.message,
                f.fix,
            )
            for f in exported.findings
        ]
        parts.append(table("Lint findings", ("rule and node", "found", "fix"), rows))
    if exported.export.float_layers:
        names = joined((code(name) for name in exported.export.float_layers), ", ")
        parts.append(tag("p", "Float layers in the file: ", names, "."))
    parts += [tag("p", note, class_="soft") for note in exported.export.notes]
    if exported.error:
        parts.append(_failed(exported))
    return joined(parts)


def _failed(exported: Exported) -> Html:
    return tag("pre", exported.error or "There is no file.", class_="missing failed")
