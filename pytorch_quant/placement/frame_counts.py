"""How often modules make which calls: what a placed model checks at run time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from pytorch_quant.dataflow import Dataflow
from pytorch_quant.placement.layers import is_scripted
from pytorch_quant.placement.plan import Place

RunCounts = dict[str, dict[int, Counter]]


def calls_by_run(flow: Dataflow) -> RunCounts:
    """The numbered calls of each kind, of each run of each module."""
    counts: RunCounts = {}
    for call in flow.calls:
        if "#" in call.site:
            counts.setdefault(call.module, {}).setdefault(call.run, Counter())[call.op] += 1
    return counts


def uneven(counts: RunCounts) -> set[tuple[str, str]]:
    """The modules and kinds of call whose number differs between the runs of the module."""
    return {
        (module, op)
        for module, runs in counts.items()
        for op in set().union(*runs.values())
        if len({run[op] for run in runs.values()}) > 1
    }


def expected(counts: RunCounts, places: Iterable[Place]) -> dict[str, dict[str, int]]:
    """`Plan.counts`: for the modules with planned calls, how many of each kind that is planned."""
    found: dict[str, dict[str, int]] = {}
    for place in places:
        if place.call is not None:
            op = place.call.partition("#")[0]
            run = next(iter(counts[place.module].values()))
            found.setdefault(place.module, {})[op] = run[op]
    return found


def framed(
    flow: Dataflow, counts: RunCounts, planned: dict[str, dict[str, int]], also: Iterable[str]
) -> list[str]:
    """`Plan.framed`: the modules whose calls must not be taken for those of a planned module.

    Args:
        flow: The pass.
        counts: Its calls.
        planned: `Plan.counts`.
        also: Modules that the pass did not reach.

    Returns:
        Names, in the order of the model. A module that is called from a planned one without being
        below it is found by its calls in between.
    """
    names = {module: name for name, module in flow.modules.items()}
    unreached = set(also)
    found: set[str] = set()
    for name, kinds in planned.items():
        inside = {names[m] for m in flow.modules[name].modules() if m in names}
        spans: dict[int, list[int]] = {}
        for call in flow.calls:
            if call.module == name:
                spans.setdefault(call.run, []).append(call.index)
        for own in spans.values():
            inside |= {call.module for call in flow.calls[own[0] : own[-1]]}
        for other in inside - {name}:
            makes = any(kinds.keys() & run.keys() for run in counts.get(other, {}).values())
            if makes or other in unreached:
                found.add(other)
    return [n for n in flow.modules if n in found and _takes_frame(flow.modules[n], n, planned)]


def _takes_frame(module: nn.Module, name: str, planned: dict[str, dict[str, int]]) -> bool:
    return name not in planned and not is_scripted(module)
