"""Bars and histograms as markup: SQNR in dB, counts on a logarithmic scale."""

from __future__ import annotations

import math

from pytorch_quant.analysis.plain_data import shown_db
from pytorch_quant.html_report.clip_lines import COLUMNS, IN_USE, METHODS, ClipLine, Panel
from pytorch_quant.html_report.markup import Html, code, joined, tag

FULL_BAR_DB = 60.0
FAIR_DB, GOOD_DB = 20.0, 30.0

_LABELS = [IN_USE, *(label for label, _, _ in METHODS)]
_DASHES = ["", "", "5 2", "2 2", "7 2 2 2", "4 4", "1 2", "9 3", "3 1"]
_WIDTH, _PLOT, _FOOT = 320, 88, 16
_LEFT, _RIGHT = 8, 312
_ROW = 12.0


def grade(db: float) -> str:
    """`bad`, `fair` or `good`: an error above 10 %, above 3 %, or below."""
    return "good" if db >= GOOD_DB else "fair" if db >= FAIR_DB else "bad"


def db_bar(db: float) -> Html:
    """An SQNR as figure and bar; the bar is full at 60 dB."""
    if math.isnan(db):
        return tag("span", "-", class_="soft")
    share = min(max(db / FULL_BAR_DB, 0.01), 1.0)
    fill = tag("span", class_=grade(db), style=f"width:{100 * share:.0f}%")
    return tag("div", tag("b", shown_db(db)), tag("i", fill, aria_hidden="true"), class_="bar")


def histogram_figure(panel: Panel, number: int) -> Html:
    """A histogram with its clip lines, their values as text, and what it shows."""
    what = "weight" if panel.is_weight else "activation"
    about = f"{panel.kind}, {what}, {panel.values:,} values"
    if panel.relative:
        about += f", {panel.channels} ranges"
        if panel.rows < panel.channels:
            about += f" ({panel.rows} drawn)"
    caption = tag("figcaption", code(panel.name), tag("span", about, class_="soft"))
    parts = [caption]
    if panel.counts:
        parts += [_drawing(panel), _legend(panel)]
    if panel.note:
        parts.append(tag("p", f"{panel.note}.", class_="soft"))
    return tag("figure", *parts, id=f"h{number}")


def _x(panel: Panel, value: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * min(value / panel.limit, 1.0)


def _drawing(panel: Panel) -> Html:
    marked = 1 + max((_LABELS.index(line.label) for line in panel.lines), default=0)
    plot_top = 8 + _ROW * marked
    base = plot_top + _PLOT
    height = base + _FOOT
    top = math.log10(1 + max(panel.counts))
    step = (_RIGHT - _LEFT) / COLUMNS
    path = f"M{_LEFT} {base:.0f}"
    for i, count in enumerate(panel.counts):
        y = base - (_PLOT * math.log10(1 + count) / top if top else 0.0)
        path += f"V{y:.0f}H{_LEFT + step * (i + 1):.1f}"
    shapes = [tag("path", d=f"{path}V{base:.0f}Z", class_="count")]
    marks = [_clip_mark(panel, line, base) for line in reversed(panel.lines)]
    # No line hides the mark of another.
    shapes += [stroke for stroke, _ in marks] + [disc for _, disc in marks]
    axis = tag("path", d=f"M{_LEFT} {base:.0f}H{_RIGHT}", class_="axis")
    unit = "|x| / largest of its channel" if panel.relative else "|x|"
    ticks = [
        tag("text", "0", x=_LEFT, y=f"{height - 4:.0f}"),
        tag("text", unit, x=_WIDTH // 2, y=f"{height - 4:.0f}", text_anchor="middle"),
        tag("text", f"{panel.limit:.3g}", x=_RIGHT, y=f"{height - 4:.0f}", text_anchor="end"),
    ]
    lines = "; ".join(f"{line.label} {line.amax:.4g}" for line in panel.lines)
    return tag(
        "svg",
        *shapes,
        axis,
        *ticks,
        viewBox=f"0 0 {_WIDTH} {height:.0f}",
        role="img",
        aria_label=f"Histogram of {panel.name}, logarithmic counts; ranges: {lines or 'none'}",
    )


def _clip_mark(panel: Panel, line: ClipLine, base: float) -> tuple[Html, Html]:
    """A line and the mark at its top, in a row of its own: those of equal ranges do not overlap."""
    number = _LABELS.index(line.label)
    x, y = _x(panel, line.amax), 7 + _ROW * number
    stroke = tag(
        "path",
        d=f"M{x:.1f} {y:.0f}V{base:.0f}",
        class_=f"clip c{number}",
        stroke="currentColor",
        stroke_dasharray=_DASHES[number] or None,
    )
    disc = tag("circle", cx=f"{x:.1f}", cy=f"{y:.0f}", r="6", class_="disc", fill="currentColor")
    digit = tag(
        "text",
        number,
        x=f"{x:.1f}",
        y=f"{y + 3.2:.1f}",
        text_anchor="middle",
        class_="digit",
    )
    mark = tag("g", disc, *([digit] if number else []), class_=f"c{number}")
    return stroke, mark


def _legend(panel: Panel) -> Html:
    titles = ("", "range", "amax", "clipped")
    rows = [tag("li", *(tag("span", title) for title in titles), class_="soft")]
    for line in panel.lines:
        number = _LABELS.index(line.label)
        span = f"{line.amax:.4g}"
        if panel.relative:
            least, most = f"{line.least:.2f}", f"{line.most:.2f}"
            span = f"{line.amax:.3f}" + ("" if least == most else f" ({least}-{most})")
        rows.append(
            tag(
                "li",
                tag("b", number or "●", class_=f"c{number}"),
                line.label,
                tag("span", span, data_amax=repr(line.amax)),
                tag("span", _percent(line.clipped), class_="soft"),
                data_method=line.label,
            )
        )
    return tag("ul", joined(rows), class_="legend")


def _percent(share: float) -> str:
    return "0" if not share else f"{share:.2%}" if share >= 1e-4 else "<0.01%"
