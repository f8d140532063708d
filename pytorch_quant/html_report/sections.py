"""The parts of the page about accuracy, layers and tensors."""

from __future__ import annotations

import json
import math

from pytorch_quant.analysis.layer_errors import LayerError, QuantizerError
from pytorch_quant.analysis.plain_data import shown_db, with_unit
from pytorch_quant.analysis.ranking import UNITS, Sensitivity
from pytorch_quant.html_report.charts import db_bar, histogram_figure
from pytorch_quant.html_report.gathered import Gathered, kinds_of
from pytorch_quant.html_report.markup import Cell, Html, code, joined, table, tag

_PASTED = 20


def missing(*content: object) -> Html:
    """What was not measured, and how to have it."""
    return tag("p", *content, class_="missing")


def facts(found: Gathered) -> Html:
    """The figures that one wants first."""
    exported, sizes = found.exported, found.sizes
    entries: list[tuple[str, object, str]] = []
    if found.accuracy:
        (first, before), *others = found.accuracy.items()
        for name, score in others:
            entries.append((f"accuracy, {name}", f"{score:.4g}", f"{first} {before:.4g}"))
    entries.append(("output, all quantized", with_unit(found.errors.output_db), "SQNR"))
    if found.ranking.rows:
        worst = found.ranking.rows[0]
        shown = _score(found.ranking, worst.score)
        entries.append(("most harmful", code(worst.name or "(model)"), f"{shown} when alone"))
    share = sizes.quantized / sizes.float if sizes.float else 1.0
    small = sizes.quantized < 1e6
    weight = f"{sizes.quantized / 1e3:.1f} KB" if small else f"{sizes.quantized / 1e6:.1f} MB"
    entries.append(("weights", weight, f"{share:.0%} of float"))
    prediction = exported.prediction
    if prediction is not None:
        count = len(prediction.rows) - len(prediction.float_rows)
        entries.append(
            (
                f"{kinds_of(prediction)} in {exported.target}",
                f"{count} of {len(prediction.rows)}",
                "nodes",
            )
        )
        entries.append(("lint findings", len(exported.findings), exported.target))
    if exported.latency is not None:
        row = exported.latency.rows[-1]
        entries.append(("latency", f"{row.median:.2f} ms", f"{row.speedup:.2f}x float"))
    cards = (
        tag("div", tag("dt", title), tag("dd", value, tag("small", note)))
        for title, value, note in entries
    )
    return tag("dl", *cards, class_="facts")


def accuracy(found: Gathered) -> Html:
    """Scores before and after."""
    if not found.accuracy:
        return missing(
            "Not measured. Pass ", code("evaluate=function"), " to measure it, or the scores that "
            "you have: ", code('accuracy={"float": 76.1, "int8": 75.9}'), "."
        )  # fmt: skip
    reference = next(iter(found.accuracy.values()))
    rows = [
        (
            code(name),
            Cell(f"{score:.6g}", score, number=True),
            Cell(f"{score - reference:+.4g}" if i else "-", number=True),
        )
        for i, (name, score) in enumerate(found.accuracy.items())
    ]
    return table("Accuracy before and after", ("model", "score", "change"), rows)


def size_and_latency(found: Gathered) -> Html:
    """Bytes and milliseconds, float beside int8."""
    sizes, exported = found.sizes, found.exported
    rows: list[tuple[object, ...]] = [
        ("weights, float", _megabytes(sizes.float), "parameters in the dtypes that they have"),
        ("weights, quantized", _megabytes(sizes.quantized), "codes and scales; 4-bit ones packed"),
    ]
    if exported.export is not None:
        where = f"for {exported.target}, opset {exported.export.opset}"
        rows.append(("ONNX file, quantized", _megabytes(exported.export.size), where))
    parts: list[Html] = [table("Sizes", ("what", "MB", "how"), rows)]
    if exported.latency is None:
        parts.append(missing("Latency was not measured. Pass ", code("latency=True"), "."))
        return joined(parts)
    report = exported.latency
    timed = [
        (
            name,
            Cell(f"{row.median:.3f}", row.median, number=True),
            Cell(f"{row.lower:.3f} to {row.upper:.3f}", number=True),
            Cell(f"{row.speedup:.2f}x", row.speedup, number=True),
            _megabytes(row.size),
        )
        for name, row in zip(("float", "quantized"), report.rows, strict=True)
    ]
    header = ("file", "median ms", "quartiles, ms", "speedup", "MB")
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in report.shapes.items())
    parts.append(tag("h3", "Latency"))
    parts.append(
        tag(
            "p",
            f"In {report.engine} on this machine's CPU, {report.threads} thread(s), "
            f"{report.rounds} rounds in turns, input {shapes}. It says nothing about a GPU.",
        )
    )
    return joined([*parts, table("Latency", header, timed)])


def layers(found: Gathered) -> Html:
    """What each layer does to the output."""
    explained = tag(
        "p",
        "SQNR of the model's output against the float model, in dB: with only this layer "
        "quantized, and with all but this one. 40 dB is an error of 1 %, 20 dB of 10 %. A short "
        "bar in the first column is a layer that hurts alone; a long one in the second, "
        "a layer that is worth leaving in float.",
    )
    first: dict[str, int] = {}
    for number, panel in enumerate(found.panels):
        for site in panel.sites:
            first.setdefault(site, number)
    header = ("layer", "only it, dB", "all but it, dB", "kind", "weight error")
    rows = [_layer(row, first.get(row.name)) for row in found.errors.layers]
    return joined([explained, table("SQNR of the output by layer", header, rows)])


def _layer(row: LayerError, panel: int | None) -> tuple[object, ...]:
    name = code(row.name or "(model)")
    weight = "-" if row.weight_error is None else f"{row.weight_error:.2%}"
    return (
        name if panel is None else tag("a", name, href=f"#h{panel}"),
        Cell(db_bar(row.only_db), row.only_db),
        Cell(db_bar(row.without_db), row.without_db),
        row.kind,
        Cell(weight, row.weight_error, number=True),
    )


def exclude(found: Gathered) -> Html:
    """The ranking, and rules to paste."""
    ranking = found.ranking
    by_sqnr = ranking.method == "sqnr"
    explained = tag(
        "p",
        f"{UNITS[ranking.method].capitalize().replace('Sqnr', 'SQNR').replace(' db', ' dB')}, when "
        "each layer is quantized alone; the most harmful first. ",
        "“Left” predicts the SQNR of the output with this layer and all above it in float, as "
        "if the noise of layers added up; measure before you rely on it."
        if by_sqnr
        else "",
    )
    header = ["rank", "layer", "kind", "score"] + (["left, dB"] if by_sqnr else [])
    noise = [10 ** (-row.score / 10) for row in ranking.rows]
    rows = []
    for i, row in enumerate(ranking.rows):
        cells: list[object] = [
            Cell(joined([f"{row.rank}. ", code(row.name or "(model)")])),
            row.kind,
            Cell(_score(ranking, row.score), row.score, number=True),
        ]
        if by_sqnr:
            left = sum(noise[i + 1 :])
            db = math.inf if left == 0 else -10 * math.log10(left)
            cells.append(Cell(shown_db(db), db, number=True))
        rows.append(cells)
    pasted = "\n".join(_rule(ranking, i) for i in range(min(_PASTED, len(ranking.rows))))
    rules = "{**rules, **exclude}" if found.ruled else "exclude"
    target = found.exported.target
    placed = "" if target == "tensorrt" else f', placement="{target}"'
    text = (
        f"exclude = {{\n{pasted}\n}}\n"
        f"model = quantize(float_model, {rules}, example_inputs=inputs{placed})"
    )
    hint = "Keep as many lines from the top as you need; a click selects all. "
    if not found.ruled:
        hint += "Rules that this model was quantized with go in front: {**rules, **exclude}. "
    if any(row.kind == "quantizer" for row in ranking.rows[:_PASTED]):
        hint += "A quantizer that was placed by hand has no rule: switch it off."
    return joined(
        [explained, table("Layers by harm", header[1:], rows), tag("h3", "Rules"),
         tag("p", hint),
         tag("pre", text, class_="paste")]
    )  # fmt: skip


def _rule(ranking: Sensitivity, i: int) -> str:
    row = ranking.rows[i]
    # As Python takes it, in the quotes of the documentation.
    name, score = json.dumps(row.name, ensure_ascii=False), _score(ranking, row.score)
    if row.kind == "quantizer":
        return f"    # {score}: model.get_submodule({name}).disable()"
    return f"    {name}: None,  # {score}"


def _score(ranking: Sensitivity, score: float) -> str:
    return with_unit(score) if ranking.method == "sqnr" else f"{score:.4g}"


def tensors(found: Gathered) -> Html:
    """What each quantizer does to what it sees."""
    header = ("quantizer", "SQNR, dB", "format", "clipped", "codes used", "dead channels")
    rows = [_tensor(row) for row in found.errors.quantizers]
    explained = tag(
        "p",
        "Each quantizer on the tensors of the float pass. Much clipped: the range is too small. "
        "Few codes used and nothing clipped: outliers stretch the range. Many dead channels: one "
        "channel is far above the others.",
    )
    return joined([explained, table("Errors of tensors", header, rows)])


def _tensor(row: QuantizerError) -> tuple[object, ...]:
    dead = "-" if row.channels is None else f"{row.dead_channels} of {row.channels}"
    return (
        code(row.name),
        Cell(db_bar(row.sqnr_db), row.sqnr_db),
        row.format,
        Cell(f"{row.clipped:.3%}" if row.values else "-", row.clipped, number=True),
        Cell(f"{row.codes_used:.1%}" if row.values else "-", row.codes_used, number=True),
        Cell(dead, number=True),
    )


def histograms(found: Gathered, *, weights: bool) -> Html:
    """The histograms of activations or of weights."""
    shown = [
        histogram_figure(panel, number)
        for number, panel in enumerate(found.panels)
        if panel.is_weight == weights
    ]
    if not shown:
        return missing("There are none." if weights else "No activation is quantized.")
    explained = tag(
        "p",
        "Magnitudes on a logarithmic scale of counts, and where each method would clip them"
        f"{'' if weights else ' on these batches'}. ",
        "Where each channel has its own range, magnitudes and ranges are shares of the largest "
        "magnitude of their channel: the line is the median channel, in brackets are the least "
        "and the most."
        if any(p.relative and p.is_weight == weights for p in found.panels)
        else "",
    )
    return joined([explained, tag("div", *shown, class_="panels")])


def _megabytes(size: int) -> Cell:
    return Cell(f"{size / 1e6:.3f}", size, number=True)
