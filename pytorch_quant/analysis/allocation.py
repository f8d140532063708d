"""One option for each layer, so that a sum is least and other sums stay within limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# HiGHS stops at an absolute gap of 1e-6; the objective is scaled to be far above.
_OBJECTIVE = 1e4
_ATTEMPTS = 20
# How much smaller the largest figure has to become for another, finer solution.
_FINER = 0.1

Figures = Mapping[str, float]


def allocate(
    options: Sequence[Sequence[Figures]], objective: str, limits: Mapping[str, float]
) -> list[int] | None:
    """The number of the chosen option of each layer; None where the limits cannot be met.

    The multiple-choice knapsack problem as an integer programme: `x[l, o]` is 1 where layer `l`
    takes option `o`, `sum_o x[l, o] = 1`, and for each limit the sum of its figures is at most the
    limit. `scipy.optimize.milp` (HiGHS) solves it to optimality. It does so up to a tolerance
    that is relative to the largest figure, which may be that of a ruinous option: what costs more
    than a solution in hand is taken out, and the rest solved again. Of options of a layer that are
    equal in what counts, the least in other figures is taken.

    Args:
        options: For each layer its options, each with its figures, all finite and >= 0.
        objective: The figure whose sum is to be least.
        limits: The most that the sums of other figures may be.
    """
    if not options:
        return []
    left = [_unbeaten(layer, (objective, *limits)) for layer in options]
    least = [min(layer[i][objective] for i in n) for layer, n in zip(options, left, strict=True)]
    best: list[int] | None = None
    while True:
        offered = [[layer[i] for i in n] for layer, n in zip(options, left, strict=True)]
        found = _solution(offered, objective, limits)
        if found is None:
            return best
        chosen = [n[i] for n, i in zip(left, found, strict=True)]
        if best is None or total(options, chosen, objective) < total(options, best, objective):
            best = chosen
        # What a layer costs above the least that it must.
        above = [
            {i: layer[i][objective] - low for i in n}
            for layer, n, low in zip(options, left, least, strict=True)
        ]
        spent = sum(costs[i] for costs, i in zip(above, best, strict=True))
        worst = max(max(costs.values()) for costs in above)
        left = [[i for i, cost in costs.items() if cost <= spent] for costs in above]
        kept = max(costs[i] for costs, n in zip(above, left, strict=True) for i in n)
        if kept > _FINER * worst or kept == 0:
            return best


def _unbeaten(layer: Sequence[Figures], keys: Sequence[str]) -> list[int]:
    """The numbers of the options that no other one beats in all of the keys."""

    def beats(one: int, other: int) -> bool:
        a, b = layer[one], layer[other]
        if any(a[key] > b[key] for key in keys):
            return False
        if any(a[key] < b[key] for key in keys):
            return True
        rest = tuple(a.values()), tuple(b.values())
        return (*rest[0], one) < (*rest[1], other)

    numbers = range(len(layer))
    return [n for n in numbers if not any(beats(o, n) for o in numbers if o != n)]


def _solution(
    options: Sequence[Sequence[Figures]], objective: str, limits: Mapping[str, float]
) -> list[int] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

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
    free = allocate(options, objective, {cost: math.inf})
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
