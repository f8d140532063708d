"""Pictures of what calibration saw and of what each method chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pytorch_quant.calib import HistogramCalibrator
from pytorch_quant.files import written_aside
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.optional import require

_COLORS = ("#b2182b", "#ef8a62", "#7b3294", "#2166ac", "#1b7837")
_PANELS = 6


def _pyplot() -> Any:
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    return require("matplotlib.pyplot")


def histograms(model: nn.Module, amax: dict[str, dict[str, float]], path: Path) -> None:
    """Draw activation histograms with each method's amax.

    Args:
        model: Calibrated with histograms.
        amax: For each method, the amax by quantizer name.
        path: The PNG file to write.
    """
    plt = _pyplot()
    collected = {}
    for name, quantizer in named_quantizers(model).items():
        calibrator = quantizer.calibrator
        if isinstance(calibrator, HistogramCalibrator):
            seen = calibrator.histogram
            if seen is not None:
                collected[name] = (seen.counts[0].numpy(), seen.edges[0].numpy())
    names = list(collected)
    shown = [names[i] for i in np.linspace(0, len(names) - 1, min(_PANELS, len(names))).astype(int)]
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for panel, name in zip(panels.flat, shown, strict=False):
        panel.stairs(*collected[name], fill=True, color="#bbbbbb")
        panel.set_yscale("log")
        panel.set_title(name.removesuffix("._input_quantizer"), fontsize=10)
        panel.set_xlim(0, 1.05 * max(ranges[name] for ranges in amax.values()))
        for (label, ranges), color in zip(amax.items(), _COLORS, strict=True):
            panel.axvline(ranges[name], color=color, label=f"{label}: {ranges[name]:.2f}")
        panel.legend(fontsize=7, loc="upper right", framealpha=1)
        panel.set_xlabel("|x|", fontsize=8)
        panel.set_ylabel("values", fontsize=8)
    figure.suptitle("Activations seen in calibration, and the amax that each method chose (4-bit)")
    _save(plt, figure, path)


def accuracies(accuracy: dict[str, float], path: Path) -> None:
    """Draw the table of accuracies as bars.

    Args:
        accuracy: Top-1 in percent by row.
        path: The PNG file to write.
    """
    plt = _pyplot()
    rows, values = list(accuracy), list(accuracy.values())
    colors = ["#2166ac" if "int8" in row else "#ef8a62" for row in rows]
    colors[rows.index("float32")] = "#555555"
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    bars = panel.barh(rows, values, color=colors)
    panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    panel.invert_yaxis()
    # The rows lie within a few percent of one another: from zero, all bars would look the same.
    start = 5 * (min(values) // 5) - 5
    panel.set_xlim(start, 101)
    panel.set_xlabel(f"top-1, % (the axis starts at {start:.0f})")
    panel.set_title("Handwritten digits: accuracy by bits and calibration method")
    panel.spines[["top", "right"]].set_visible(False)
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> None:
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    plt.close(figure)
