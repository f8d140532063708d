"""The tables of `qat_accuracy.py` in markdown: accuracies, and differences paired by image."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from qat_accuracy_models import NETWORKS
from qat_accuracy_training import CHANNEL, FLOAT, QAT, RESCALED, TENSOR, Settings, fold_of, row

COLUMNS = {"8 bits": (8, ""), "4 bits": (4, ""), "8 bits, rescaled": (8, RESCALED)}


class Claim(NamedTuple):
    """A difference that has to come out."""

    text: str
    better: str
    worse: str
    asked: str
    holds: Callable[[float], bool]


CLAIMS = [
    Claim(
        "per-channel less per-tensor, 4 bits",
        row(4, CHANNEL),
        row(4, TENSOR),
        "at least 10",
        lambda d: d >= 10,
    ),
    Claim(
        "per-channel less per-tensor, 8 bits, rescaled",
        row(8, CHANNEL, RESCALED),
        row(8, TENSOR, RESCALED),
        "at least 10",
        lambda d: d >= 10,
    ),
    Claim("QAT less FP32, 4 bits", row(4, QAT), FLOAT, "at least -1", lambda d: d >= -1),
    Claim("QAT less FP32, 8 bits", row(8, QAT), FLOAT, "at least -0.3", lambda d: d >= -0.3),
]
RECOVERED = "share of the gap from per-channel PTQ to FP32 that QAT recovers, 4 bits"


def tables(results: dict[str, Any], settings: Settings) -> str:
    """Both tables of every network that has results.

    Args:
        results: What the file holds.
        settings: Of the run.
    """
    lines: list[str] = []
    for network in NETWORKS:
        right = tested(results, network, settings)
        if right:
            lines += [*accuracies(network, right), "", *differences(network, right), ""]
    return "\n".join(lines)


def tested(
    results: dict[str, Any], network: str, settings: Settings
) -> dict[str, list[np.ndarray]]:
    """For each row an array per seed: 1 where an image was right, 0 wrong, NaN not tested yet."""
    right: dict[str, list[np.ndarray]] = {}
    for index, seed in enumerate(settings.numbers):
        for fold in range(settings.folds):
            cell = results["cells"].get(f"{network}/{seed}/{fold}")
            if cell is None:
                continue
            _, labels, test = fold_of(seed, fold, settings)
            for name, wrong in cell["wrong"].items():
                seeds = right.setdefault(name, [])
                while len(seeds) <= index:
                    seeds.append(np.full(len(labels), np.nan))
                seeds[index][test.numpy()] = 1
                seeds[index][wrong] = 0
    return right


def accuracies(network: str, right: dict[str, list[np.ndarray]]) -> list[str]:
    """Mean and standard deviation over the seeds, in percent."""
    lines = [
        f"| {network}, top-1 % | {' | '.join(COLUMNS)} |",
        "|---|" + "--:|" * len(COLUMNS),
        f"| {FLOAT} | " + " | ".join([spread(right[FLOAT])] * len(COLUMNS)) + " |",
    ]
    for method in (TENSOR, CHANNEL, QAT):
        names = [row(bits, method, kind) for bits, kind in COLUMNS.values()]
        cells = [spread(right[name]) if name in right else "" for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def differences(network: str, right: dict[str, list[np.ndarray]]) -> list[str]:
    """What has to come out, with 95 % intervals over the images."""
    lines = [
        f"| {network}, difference in points | measured | 95 % interval | asked | |",
        "|---|--:|--:|--:|---|",
    ]
    for claim in CLAIMS:
        each = by_image(right[claim.better]) - by_image(right[claim.worse])
        each = 100 * each[~np.isnan(each)]
        middle, half = each.mean(), 1.96 * each.std(ddof=1) / math.sqrt(len(each))
        interval = f"{middle - half:.2f} to {middle + half:.2f}"
        verdict = "yes" if claim.holds(middle) else "no"
        lines.append(f"| {claim.text} | {middle:.2f} | {interval} | {claim.asked} | {verdict} |")
    start, end, most = (
        np.nanmean(by_image(right[name])) for name in (row(4, CHANNEL), row(4, QAT), FLOAT)
    )
    if most > start:
        share = 100 * (end - start) / (most - start)
        verdict = "yes" if share >= 80 else "no"
        lines.append(f"| {RECOVERED} | {share:.0f} % | | at least 80 % | {verdict} |")
    return lines


def by_image(seeds: list[np.ndarray]) -> np.ndarray:
    """How often each image was right, 0 to 1; the seeds see the same images."""
    return np.ma.masked_invalid(np.stack(seeds)).mean(0).filled(np.nan)


def spread(seeds: list[np.ndarray]) -> str:
    """The mean over the seeds and their standard deviation."""
    values = [100 * float(np.nanmean(seed)) for seed in seeds]
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{deviation}"
