"""Draw the pictures of docs/concepts.md and docs/deploy.md.

python tools/draw_docs.py                  # writes docs/images/*.svg
python tools/draw_docs.py --png /tmp/look  # and PNG files to look at
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from pytorch_quant.calib import Histogram, entropy_amax, mse_amax, percentile_amax
from pytorch_quant.fake_quant import fake_quantize
from pytorch_quant.formats import IntFormat

matplotlib.use("Agg")
IMAGES = Path(__file__).parent.parent / "docs" / "images"
# A card of its own colour, so that a picture reads the same on a light and on a dark page.
CARD, INK, FAINT = "#f6f4ef", "#22262b", "#9aa0a6"
BLUE, RED, GREEN, GOLD, VIOLET = "#2166ac", "#b2182b", "#1b7837", "#b35806", "#762a83"
matplotlib.rcParams.update(
    {
        "figure.facecolor": CARD,
        "axes.facecolor": CARD,
        "savefig.facecolor": CARD,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 11,
        "legend.frameon": False,
        # The same bytes each time, and glyphs as shapes: no font is needed to read them.
        "svg.hashsalt": "pytorch_quant",
        "svg.fonttype": "path",
    }
)


def quantizer() -> Figure:
    """A 3-bit quantizer as a staircase, and its error."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    steps, error = figure.subplots(1, 2)
    amax, bits = 3.0, IntFormat(3)
    x = torch.linspace(-4.5, 4.5, 4001)
    y = fake_quantize(x, torch.tensor(amax), bits)
    # A line through the jumps, as a step is.
    steps.plot(x, x, color=FAINT, linestyle="--", linewidth=1)
    steps.plot(x, y, color=BLUE, linewidth=2)
    codes = range(int(bits.qmin), int(bits.qmax) + 1)
    steps.set_yticks([code * amax / bits.qmax for code in codes])
    steps.set_yticklabels([f"{code}" for code in codes])
    steps.set_ylabel("code q      (y = q * scale)")
    steps.set_xlabel("x")
    steps.set_title("3 bits: eight codes")
    steps.axvline(amax, color=RED, linewidth=1, linestyle=":")
    steps.annotate("amax", (amax, -3.6), color=RED, ha="center", backgroundcolor=CARD)
    steps.annotate("clipped", (3.75, 3.2), color=RED, ha="center", va="bottom")
    steps.annotate("", (-2.5, 0), (-2.5, 1), arrowprops={"arrowstyle": "<->", "color": GREEN})
    steps.annotate("scale =\namax / 3", (-2.7, 0.5), color=GREEN, ha="right", va="center")
    error.axhspan(-0.5, 0.5, color=GREEN, alpha=0.12, linewidth=0)
    error.plot(x, y - x, color=BLUE, linewidth=1.5)
    error.axhline(0, color=FAINT, linewidth=1)
    error.set_xlabel("x")
    error.set_ylabel("error y - x")
    error.set_title("at most half a scale, unless clipped")
    error.annotate("± scale / 2", (-0.1, 0.62), color=GREEN, ha="center")
    error.set_ylim(-1.6, 1.6)
    return figure


def ranges() -> Figure:
    """Symmetric, unsigned and asymmetric grids of four bits over one tensor."""
    figure = Figure(figsize=(9, 4.0), layout="constrained")
    axes = figure.subplots()
    x = np.random.default_rng(0).normal(0.9, 0.75, 9000)
    counts, edges = np.histogram(x[(x > -0.4) & (x < 3.0)], 80)
    axes.stairs(0.85 * counts / counts.max(), edges, fill=True, color=FAINT, alpha=0.6)
    rows = [
        (0.35, INK, "a tensor", "values from -0.4 to 3", None),
        (-0.6, BLUE, "symmetric, signed", "scale = amax / 7; TensorRT runs this", (7, 3 / 7)),
        (-1.5, GREEN, "unsigned", "twice as fine, no negative values", (0, 3 / 15)),
        (-2.4, VIOLET, "asymmetric", "covers what is there; zero point 2", (2, 3.4 / 15)),
    ]
    for y, color, name, note, grid in rows:
        axes.annotate(name, (-6.6, y + 0.15), va="center", color=color, fontweight="bold")
        axes.annotate(note, (-6.6, y - 0.2), va="center", fontsize=9.5)
        if grid is not None:
            zero, scale = grid
            values = (np.arange(15 if zero == 7 else 16) - zero) * scale
            axes.plot(
                values, np.full(len(values), y), "|", color=color, markersize=18, markeredgewidth=2
            )
    axes.plot([0, 0], [-2.9, 1], color=RED, linewidth=1, linestyle=":", zorder=0)
    axes.annotate("0", (0, 1.05), color=RED, ha="center")
    axes.set_xlim(-6.7, 3.2)
    axes.set_ylim(-3.0, 1.3)
    axes.set_xticks(range(-3, 4))
    axes.spines["bottom"].set_bounds(-3.2, 3.2)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title("Three 4-bit grids; 0 is a code of each")
    return figure


def per_channel() -> Figure:
    """Weights of six channels, with one range and with one each."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    sizes = np.array([0.06, 0.9, 0.2, 0.1, 0.45, 0.03])
    generator = np.random.default_rng(1)
    weights = generator.uniform(-1, 1, (len(sizes), 60)) * sizes[:, None]
    for panel, amax, title in [
        (panels[0], np.full(len(sizes), np.abs(weights).max()), "per tensor: one amax"),
        (panels[1], np.abs(weights).max(1), "per channel: an amax for each"),
    ]:
        for channel, (row, top) in enumerate(zip(weights, amax, strict=True)):
            for code in range(-7, 8):
                level = code * top / 7
                line = [channel - 0.38, channel + 0.38]
                panel.plot(line, [level, level], color=FAINT, linewidth=0.8)
            spread = channel + generator.uniform(-0.3, 0.3, len(row))
            panel.plot(spread, row, ".", color=BLUE, markersize=4)
            used = len(np.unique(np.round(row / (top / 7))))
            panel.annotate(f"{used} of 15", (channel, 1.0), ha="center", fontsize=9, color=GREEN)
        panel.set_title(title)
        panel.set_xlabel("output channel")
        panel.set_ylim(-1.0, 1.1)
    panels[0].set_ylabel("weight; lines are the values of the codes")
    panels[0].annotate("codes used:", (-0.45, 1.06), fontsize=9, color=GREEN, va="bottom")
    return figure


def clipping() -> Figure:
    """An activation with a tail, the amax of each method, and what each amax costs."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator).relu()
    x = torch.where(torch.rand(len(x), generator=generator) < 0.002, 5 * x, x)
    histogram = Histogram()
    histogram.update(x)
    seen, bits = (histogram.counts, histogram.width), IntFormat(4)
    found = {
        "max": (float(x.max()), RED),
        "percentile 99.99": (float(percentile_amax(*seen, 99.99)), GOLD),
        "percentile 99.9": (float(percentile_amax(*seen, 99.9)), VIOLET),
        "mse": (float(mse_amax(*seen, bits)), BLUE),
        "entropy": (float(entropy_amax(*seen, bits)), GREEN),
    }
    counts, edges = np.histogram(x[x > 0], 120)
    left.stairs(counts, edges, fill=True, color=FAINT)
    left.set_yscale("log")
    left.set_xlabel("activation")
    left.set_ylabel("values")
    left.set_title("where each method puts amax")
    tops = np.linspace(0.4, float(x.max()) * 1.02, 160)
    inside, outside = [], []
    for top in tops:
        squares = (fake_quantize(x, torch.tensor(float(top)), bits) - x).double().square()
        clipped = x > top
        inside.append(float(squares[~clipped].sum()) / len(x))
        outside.append(float(squares[clipped].sum()) / len(x))
    right.plot(tops, inside, color=INK, linestyle="--", linewidth=1, label="rounding")
    right.plot(tops, outside, color=INK, linestyle=":", linewidth=1.4, label="clipping")
    right.plot(tops, np.add(inside, outside), color=INK, linewidth=2, label="both")
    right.set_yscale("log")
    right.set_ylim(1e-5, 3)
    right.set_xlabel("amax")
    right.set_ylabel("mean squared error")
    right.set_title("4 bits: clip more, round finer")
    for label, (amax, color) in found.items():
        left.axvline(amax, color=color, linewidth=1.8, label=label)
        right.axvline(amax, color=color, linewidth=1.2)
    plain = {"framealpha": 1, "frameon": True, "facecolor": CARD, "edgecolor": CARD}
    left.legend(loc="upper right", bbox_to_anchor=(0.95, 1), **plain)
    right.legend(loc="upper center", ncols=3, **plain)
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, text: str, color: str = INK, width: float = 1.15) -> None:
    style = "round,pad=0.03,rounding_size=0.09"
    fill = CARD if color == INK else color
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.2),
            width,
            0.4,
            boxstyle=style,
            facecolor=fill,
            edgecolor=color,
            zorder=2,
        )
    )
    shade = INK if color == INK else "white"
    axes.annotate(text, (x, y), ha="center", va="center", color=shade, fontsize=10, zorder=3)


def _arrow(axes: Axes, *points: tuple[float, float], color: str = INK, head: bool = True) -> None:
    for start, end in pairwise(points[:-1]):
        axes.plot([start[0], end[0]], [start[1], end[1]], color=color, linewidth=1.3)
    axes.add_patch(
        FancyArrowPatch(
            points[-2],
            points[-1],
            arrowstyle="-|>" if head else "-",
            mutation_scale=11,
            color=color,
            linewidth=1.3,
            shrinkA=0,
            shrinkB=0,
        )
    )


def _kernel(axes: Axes, left: float, right: float, y: float) -> None:
    """The ground behind operators that run as one kernel."""
    axes.add_patch(
        FancyBboxPatch(
            (left, y - 0.34),
            right - left,
            0.68,
            boxstyle="round,pad=0.02,rounding_size=0.12",
            facecolor="#d3e2f0",
            edgecolor="none",
            zorder=0,
        )
    )


def placement() -> Figure:
    """A residual block with Q/DQ where TensorRT fuses them, and where it does not."""
    figure, axes = _canvas(10.2, 5.0)
    titles = [
        (2.75, "where TensorRT wants them: two int8 kernels"),
        (0.15, "a pair behind every operator: each is a kernel of its own"),
    ]
    operators = {2.2: "Conv", 3.8: "ReLU", 5.4: "Conv", 7.0: "Add", 8.6: "ReLU"}
    for base, title in titles:
        axes.annotate(title, (0.1, base + 2.0), fontweight="bold", va="center")
        y, branch, fused = base + 0.55, base + 1.4, base > 1
        pairs = [1.0, 4.6] if fused else [1.0, 3.0, 4.6, 6.2, 7.8, 9.4]
        if fused:
            for left, right in ((1.75, 4.22), (4.98, 9.02)):
                _kernel(axes, left, right, y)
        stops = sorted([(x, 0.62) for x in operators] + [(x, 0.5) for x in pairs])
        for x, name in operators.items():
            _box(axes, x, y, name, width=0.62)
        for x in pairs:
            _box(axes, x, y, "Q DQ", BLUE if fused or x in (1.0, 4.6) else RED, 0.5)
        edges = [(0.15, 0.0), *stops, (10.1, 0.0)]
        for (a, wide), (b, next_wide) in pairwise(edges):
            reach = 0.03 if next_wide else 0.0
            start = a + wide / 2 + (0.03 if wide else 0.0)
            _arrow(axes, (start, y), (b - next_wide / 2 - reach, y))
        axes.annotate("x", (0.3, y + 0.12))
        _arrow(axes, (1.55, y), (1.55, branch), (7.0, branch), (7.0, y + 0.24))
        if fused:
            note = "the identity: the same pair, read twice"
            axes.annotate(note, (4.2, branch + 0.1), ha="center", color=BLUE, fontsize=10)
        else:
            _box(axes, 4.2, branch, "Q DQ", RED, 0.5)
    return figure


def ways() -> Figure:
    """Static, dynamic, weight-only and trained: when ranges are found."""
    figure, axes = _canvas(9.6, 3.9)
    for x, text in [(1.0, ""), (3.2, "before"), (5.7, "in the file"), (8.1, "at run time")]:
        axes.annotate(text, (x, 3.7), ha="center", fontweight="bold", va="center")
    lanes = [
        ("static (PTQ)", BLUE, "calibrate on batches", "scales of x and w", "int8 x int8"),
        ("trained (QAT)", GREEN, "calibrate, then train", "scales of x and w", "int8 x int8"),
        ("dynamic", GOLD, "nothing", "scales of w", "range of x, then int8 x int8"),
        ("weight-only", VIOLET, "nothing", "int4 w, scales by block", "w to float, float x float"),
    ]
    for row, (name, color, before, held, running) in enumerate(lanes):
        y = 3.1 - 0.85 * row
        axes.annotate(name, (0.1, y), color=color, fontweight="bold", va="center", fontsize=12)
        _box(axes, 3.2, y, before, color if before != "nothing" else INK, 1.9)
        _box(axes, 5.7, y, held, color, 1.95)
        _box(axes, 8.1, y, running, color, 2.3)
        _arrow(axes, (4.2, y), (4.68, y))
        _arrow(axes, (6.72, y), (6.9, y))
    return figure


def targets() -> Figure:
    """One residual block in the form of TensorRT, and in that of x86 CPUs."""
    figure, axes = _canvas(10.8, 6.3)
    operators = {2.3: "Conv", 3.3: "ReLU", 5.5: "Conv", 7.7: "Add", 8.7: "ReLU"}
    # Pairs by place: what they hold, and a colour for each type. Kernels from left to right.
    int8, zero, middle = ("int8\nzp 0", BLUE), ("uint8\nzp 0", GREEN), ("uint8\nzp 128", GOLD)
    rows = [
        (
            3.35,
            'target="tensorrt"',
            {1.15: int8, 4.4: int8, 9.8: int8},
            [(1.95, 3.68), (5.15, 9.08)],
            "Integer activations are int8 with zero point 0. No pair between Conv and Add:\n"
            "one kernel computes both. The identity is read from the pair of the first Conv.",
        ),
        (
            0.1,
            'target="onnxruntime" or "openvino"',
            {1.15: middle, 4.4: zero, 6.6: middle, 9.8: zero},
            [(1.95, 3.68), (5.15, 5.85), (7.35, 9.08)],
            "x86 multiplies uint8 by int8. Behind a ReLU nothing is negative: zero point 0\n"
            "spends all codes on what is there, and clips as the ReLU does. Every kernel has\n"
            "a DQ before it and a Q behind it, the Add as well.",
        ),
    ]
    for base, title, pairs, kernels, note in rows:
        y, branch = base + 1.58, base + 2.4
        axes.annotate(title, (0.1, base + 2.75), fontweight="bold", va="center")
        axes.annotate(note, (0.1, base + 0.24), va="center", fontsize=10)
        for left, right in kernels:
            _kernel(axes, left, right, y)
        for x, name in operators.items():
            _box(axes, x, y, name, width=0.62)
        for x, (held, color) in pairs.items():
            _box(axes, x, y, "Q  DQ", color, 0.62)
            axes.annotate(held, (x, y - 0.28), ha="center", va="top", color=color, fontsize=9)
        for x in (2.3, 5.5):
            _box(axes, x, y - 0.72, "w  DQ", VIOLET, 0.62)
            axes.annotate("int8", (x + 0.4, y - 0.72), va="center", color=VIOLET, fontsize=9)
            _arrow(axes, (x, y - 0.48), (x, y - 0.24))
        edges = [(0.15, 0.0), *sorted((x, 0.62) for x in (*operators, *pairs)), (10.7, 0.0)]
        for (a, wide), (b, next_wide) in pairwise(edges):
            start = a + wide / 2 + (0.03 if wide else 0.0)
            _arrow(axes, (start, y), (b - next_wide / 2 - (0.03 if next_wide else 0.0), y))
        axes.annotate("x", (0.35, y + 0.12))
        _arrow(axes, (1.72, y), (1.72, branch), (7.7, branch), (7.7, y + 0.24))
    return figure


PICTURES: list[Callable[[], Figure]] = [
    quantizer,
    ranges,
    per_channel,
    clipping,
    placement,
    ways,
    targets,
]


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--png", type=Path, help="a folder for PNG files as well")
    png = parser.parse_args().png
    IMAGES.mkdir(exist_ok=True)
    for draw in PICTURES:
        figure = draw()
        figure.savefig(IMAGES / f"{draw.__name__}.svg", metadata={"Date": None})
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            figure.savefig(png / f"{draw.__name__}.png", dpi=80)


if __name__ == "__main__":
    main()
