"""The pictures of the page as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pytorch_quant.files import written_aside
from pytorch_quant.html_report.charts import FULL_BAR_DB, grade
from pytorch_quant.html_report.clip_lines import COLUMNS, IN_USE, METHODS, Panel
from pytorch_quant.html_report.gathered import Gathered
from pytorch_quant.optional import require

_GRADES = {"good": "#1a7f4b", "fair": "#d08700", "bad": "#c0272d"}
_COLORS = (
    *("#1b1f24", "#c0272d", "#6f35a5", "#a15c00", "#0b62c4"),
    *("#0b6e75", "#1a7f37", "#b0257a", "#6b4f2a"),
)
_STYLES = ("-", "-", "--", ":", "-.", (0, (4, 4)), (0, (1, 2)), (0, (9, 3)), (0, (3, 1)))
_LABELS = [IN_USE, *(label for label, _, _ in METHODS)]
_ACROSS, _DOWN = 3, 4
_LAYERS = 40


def pyplot() -> Any:
    """Matplotlib without a window.

    Raises:
        ImportError: it is not installed.
    """
    require("matplotlib").use("Agg")
    return require("matplotlib.pyplot")


def write_pictures(found: Gathered, folder: Path, progress: bool) -> tuple[Path, ...]:
    """Draw the bars and the histograms, as many files as they need.

    Args:
        found: What the page shows.
        folder: Where they go; made if it is not there.
        progress: Show a progress bar.

    Returns:
        `layers_1.png`, ..., `activations_1.png`, ..., `weights_1.png`, ...

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written to, or is a file.
    """
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    rows = found.errors.layers
    drawn = [panel for panel in found.panels if panel.counts]
    jobs: list[tuple[str, Any, Any]] = [
        (f"layers_{1 + i // _LAYERS}.png", _layers, rows[i : i + _LAYERS])
        for i in range(0, len(rows), _LAYERS)
    ]
    for kind, weights in (("activations", False), ("weights", True)):
        panels = [panel for panel in drawn if panel.is_weight == weights]
        size = _ACROSS * _DOWN
        jobs += [
            (f"{kind}_{1 + i // size}.png", _histograms, panels[i : i + size])
            for i in range(0, len(panels), size)
        ]
    paths = []
    for name, draw, content in tqdm(jobs, "report: pictures", disable=not progress):
        figure = draw(plt, content)
        try:
            with written_aside(folder / name) as aside:
                figure.savefig(aside, dpi=110, format="png")
        finally:
            plt.close(figure)
        paths.append(folder / name)
    return tuple(paths)


def _layers(plt: Any, rows: Any) -> Any:
    figure, panel = plt.subplots(figsize=(9, 1.6 + 0.28 * len(rows)), layout="constrained")
    values = [min(max(np.nan_to_num(row.only_db, posinf=FULL_BAR_DB), 0.0), 1e3) for row in rows]
    colors = [_GRADES[grade(row.only_db)] for row in rows]
    bars = panel.barh(range(len(rows)), values, color=colors)
    names = [row.name or "(model)" for row in rows]
    panel.set_yticks(range(len(rows)), names, fontsize=8, parse_math=False)
    labels = ["exact" if row.only_db == np.inf else f"{row.only_db:.1f}" for row in rows]
    panel.bar_label(bars, labels=labels, padding=3, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.1, y=0.01)
    panel.set_xlabel("SQNR of the output with only this layer quantized, dB")
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def _histograms(plt: Any, panels: list[Panel]) -> Any:
    down = -(-len(panels) // _ACROSS)
    figure, grid = plt.subplots(
        down, _ACROSS, figsize=(13, 3.6 * down), layout="constrained", squeeze=False
    )
    for place, panel in zip(grid.flat, panels, strict=False):
        edges = np.linspace(0, panel.limit, COLUMNS + 1)
        place.stairs(panel.counts, edges, fill=True, color="#b4bcc6")
        place.set_yscale("symlog", linthresh=1)
        place.set_xlim(0, panel.limit)
        # A dollar sign in a name begins no formula.
        place.set_title(panel.name, fontsize=8, wrap=True, parse_math=False)
        for line in panel.lines:
            i = _LABELS.index(line.label)
            place.axvline(
                min(line.amax, panel.limit),
                color=_COLORS[i],
                linestyle=_STYLES[i],
                linewidth=2.2 if not i else 1.3,
                label=f"{line.label}: {line.amax:.3g}",
            )
        if panel.lines:
            place.legend(
                fontsize=6.5,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.17),
                ncols=3,
                frameon=False,
            )
        unit = "|x| / largest of its channel" if panel.relative else "|x|"
        place.set_xlabel(unit, fontsize=8)
        place.tick_params(labelsize=7)
    for place in grid.flat[len(panels) :]:
        place.set_visible(False)
    return figure
