"""Planned uses of tensors, and their grouping into quantizers: one for each tensor (L5)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.plan import Place, PlannedQuantizer

Key = Hashable
"""A tensor: the index of its root value, or a tuple for tensors that are no value."""


@dataclass(frozen=True)
class Use:
    """One quantized operand of one call of the recorded pass.

    Attributes:
        place: Where.
        key: The tensor.
        descriptor: How.
        op: The kind of the layer or call.
        reason: Why.
        run: Which run of the module.
        order: When: the index of the call, and the operand's place in it.
    """

    place: Place
    key: Key
    descriptor: QuantDescriptor
    op: str
    reason: str
    run: int
    order: tuple[int, int]


class Groups:
    """Disjoint sets of tensors that share one quantizer, for each descriptor apart."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def find(self, item: Hashable) -> Hashable:
        """The representative of the set of `item`."""
        while self._parent.get(item, item) != item:
            self._parent[item] = self._parent.get(self._parent[item], self._parent[item])
            item = self._parent[item]
        return item

    def join(self, one: Hashable, other: Hashable) -> None:
        """Make one set of two."""
        self._parent[self.find(other)] = self.find(one)


def share(
    uses: Iterable[Use],
    joined: Iterable[tuple[Key, Key]],
    signless: Callable[[Iterable[Key], QuantDescriptor], bool],
) -> list[PlannedQuantizer]:
    """One quantizer for each group of uses.

    Args:
        uses: All of them. Those at one place, in several runs of a module, form a group.
        joined: Pairs of tensors that need one scale.
        signless: Whether a group of tensors takes an unsigned quantizer.

    Returns:
        The quantizers, in the order of their first uses.
    """
    groups = Groups()
    uses = sorted(uses, key=lambda use: use.order)
    descriptors = dict.fromkeys(use.descriptor for use in uses)
    for one, other in joined:
        for descriptor in descriptors:
            groups.join((one, descriptor), (other, descriptor))
    at_place: dict[Place, Hashable] = {}
    for use in uses:
        node = use.key, use.descriptor
        groups.join(at_place.setdefault(use.place, node), node)
    members: dict[Hashable, list[Use]] = {}
    for use in uses:
        members.setdefault(groups.find((use.key, use.descriptor)), []).append(use)
    return [_quantizer(group, signless) for group in members.values()]


def _quantizer(
    group: list[Use], signless: Callable[[Iterable[Key], QuantDescriptor], bool]
) -> PlannedQuantizer:
    first = group[0]
    descriptor = first.descriptor
    if signless({use.key for use in group}, descriptor):
        descriptor = descriptor.replace(unsigned=True)
    places = tuple(dict.fromkeys(use.place for use in group))
    reasons = dict.fromkeys(use.reason for use in group)
    return PlannedQuantizer(descriptor, places, first.op, "; ".join(reasons))


def in_agreement(uses: list[Use], runs: dict[str, set[int]]) -> tuple[list[Use], set[str]]:
    """Drop calls that only some runs of their module would quantize.

    Args:
        uses: All uses.
        runs: The runs of each module in which it made calls.

    Returns:
        The uses that all runs of their module agree about, and the sites of the others.
    """
    seen: dict[tuple[str, str | None], dict[int, set[Place]]] = {}
    for use in uses:
        place = use.place
        seen.setdefault((place.module, place.call), {}).setdefault(use.run, set()).add(place)
    odd = {
        call
        for call, by_run in seen.items()
        if set(by_run) != runs.get(call[0], set(by_run))
        or len({frozenset(places) for places in by_run.values()}) > 1
    }
    kept = [use for use in uses if (use.place.module, use.place.call) not in odd]
    return kept, {module if call is None else f"{module}/{call}" for module, call in odd}
