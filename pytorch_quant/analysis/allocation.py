"""One option for each layer, so that a sum is least and other sums stay within limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# HiGHS stops at an absolute gap of 1e-6; the objective is scaled to be far above.
_OBJECTIVE = 1e4
_ATTEMPTS = 20

Figures = Mapping[str, float]


def allocate(
    options: Sequence[Sequence[Figures]], objective: str, limits: Mapping[str, float]
) -> list[int] | None:
    """The number of the chosen option of each layer; None where the limits cannot be met.

    The multiple-choice knapsack problem as an integer programme: `x[l, o]` is 1 where layer `l`
    takes option `o`, `sum_o x[l, o] = 1`, and for each limit the sum of its figures is at most the
    limit. `scipy.optimize.milp` (HiGHS) solves it to optimality.

    Args:
        options: For each layer its options, each with its figures, all finite and >= 0.
        objective: The figure whose sum is to be least.
        limits: The most that the sums of other figures may be.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not options:
        return []
    flat = [figures for layer in options for figures in layer]
    cost = np.array([figures[objective] for figures in flat])
    # The least of each layer is paid in any case: what differs is what counts.
    cheapest = [min(f[objective] for f in layer) for layer in options for _ in layer]
    cost = cost - np.array(cheapest)
    scale = float(cost.max())
    one_each = np.zeros((len(options), len(flat)))
    start = 0
    for number, layer in enumerate(options):
        one_each[number, start : start + len(layer)] = 1
        start += len(layer)
    rows = {key: np.array([figures[key] for figures in flat]) for key in limits}
    room = dict(limits)
    for _ in range(_ATTEMPTS):
        constraints = [LinearConstraint(one_each, 1, 1)]
        for key, row in rows.items():
            unit = max(float(row.max()), 1e-300)
            constraints.append(LinearConstraint(row[None] / unit, -np.inf, room[key] / unit))
        found: Any = milp(
            cost * (_OBJECTIVE / scale) if scale > 0 else cost,
            constraints=constraints,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        chosen, start = [], 0
        for layer in options:
            chosen.append(int(np.argmax(found.x[start : start + len(layer)])))
            start += len(layer)
        over = {
            key: excess
            for key, limit in limits.items()
            if (excess := total(options, chosen, key) - limit) > 0
        }
        if not over:
            return chosen
        # The solver keeps limits up to a tolerance, users exactly.
        for key, excess in over.items():
            room[key] -= 2 * excess
    return None


def total(options: Sequence[Sequence[Figures]], chosen: Sequence[int], key: str) -> float:
    """The sum of one figure over the chosen options."""
    return float(sum(layer[i][key] for layer, i in zip(options, chosen, strict=True)))


def front(
    options: Sequence[Sequence[Figures]], cost: str, objective: str, points: int
) -> list[list[int]]:
    """Choices with the least objective at limits of the cost, the dearest first.

    The limits lie at even ratios between the cost of the best choice and the least cost.

    Choices that another one beats in both are left out, so that there may be fewer than `points`.
    """
    least = sum(min(figures[cost] for figures in layer) for layer in options)
    free = allocate(options, objective, {})
    if free is None:
        return []
    most = max(total(options, free, cost), least)
    found: list[tuple[float, float, list[int]]] = []
    for limit in np.geomspace(max(most, 1e-300), max(least, 1e-300), points):
        chosen = allocate(options, objective, {cost: float(limit) * (1 + 1e-9)})
        if chosen is not None:
            found.append((total(options, chosen, cost), total(options, chosen, objective), chosen))
    kept: list[tuple[float, float, list[int]]] = []
    for here in found:
        beaten = any(
            other[0] <= here[0] and other[1] <= here[1] and other[:2] != here[:2] for other in found
        )
        if not beaten and all(here[:2] != other[:2] for other in kept):
            kept.append(here)
    return [chosen for _, _, chosen in kept]
