"""Calls without weights that are quantized where their result is quantized again (L6, L8)."""

from __future__ import annotations

from pytorch_quant.dataflow import Call
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.plan import Operand
from pytorch_quant.placement.products import PRODUCTS
from pytorch_quant.placement.tracing import Tracing, operands

Taken = dict[int, dict[Operand, QuantDescriptor | None]]
"""The operands that get a quantizer, by the index of the call; None for one that was there."""

CONCATENATIONS = frozenset({"cat", "stack"})
AVERAGES = frozenset({"avg_pool", "adaptive_avg_pool", "mean"})
PAIRED = frozenset({"add", "mul"})


class Readers:
    """What becomes of a value further down.

    `settle` is asked for the results of one call after another, the last first.

    Args:
        tracing: The pass.
        taken: What is quantized so far; it may grow by calls that come before those asked about.
    """

    def __init__(self, tracing: Tracing, taken: Taken) -> None:
        self._tracing = tracing
        self._taken = taken
        self.settled: dict[int, frozenset[QuantDescriptor] | None] = {}

    def settle(self, value: int) -> frozenset[QuantDescriptor] | None:
        """Note how all readers of a value quantize it, also behind calls that keep its grid.

        Returns:
            The descriptors, none of them for a tensor that nothing reads or that quantizers of
            before take; None if one reader is float or the model returns the value.
        """
        self.settled[value] = self._descriptors(value)
        return self.settled[value]

    def _descriptors(self, value: int) -> frozenset[QuantDescriptor] | None:
        if self._tracing.returned(value):
            return None
        found: set[QuantDescriptor] = set()
        for call in self._tracing.readers(value):
            here = self._here(call, value)
            if here is not None:
                found |= here
                continue
            onward = self._tracing.passed_on(call, value)
            if not onward:
                return None
            for result in onward:
                behind = self.settled.get(result)
                if behind is None:
                    return None
                found |= behind
        return frozenset(found)

    def _here(self, call: Call, value: int) -> set[QuantDescriptor] | None:
        taken = self._taken.get(call.index, {})
        paths = [path for path, v in operands(call).items() if v == value]
        if not paths or not all(path in taken for path in paths):
            return None
        return {d for d in (taken[path] for path in paths) if d is not None}

    def reached(self, value: int, descriptor: QuantDescriptor) -> list[int]:
        """The values with this descriptor that lie on the grid of `value`, itself included."""
        found, waiting, seen = [], [value], {value}
        while waiting:
            value = waiting.pop()
            for call in self._tracing.readers(value):
                if descriptor in (self._here(call, value) or ()):
                    found.append(value)
                    continue
                for result in self._tracing.passed_on(call, value):
                    if result not in seen:
                        seen.add(result)
                        waiting.append(result)
        return found

    def is_read(self, value: int) -> bool:
        """Whether anything reads it or the model returns it."""
        return bool(self._tracing.readers(value)) or self._tracing.returned(value)


def concatenated(call: Call, tracing: Tracing) -> dict[Operand, int]:
    """The floating-point tensors that a call concatenates, if one of them is an activation."""
    if call.op not in CONCATENATIONS or not call.outputs:
        return {}
    if not tracing.active(call.outputs[0]):
        return {}
    floats = tracing.flow.values
    return {p: v for p, v in operands(call).items() if floats[v].dtype.is_floating_point}


def averaged(call: Call, tracing: Tracing) -> tuple[Operand, int] | None:
    """The way to what a call averages over all or some places of an image, and its value."""
    if call.op not in AVERAGES:
        return None
    tensor = next(iter(operands(call).items()), None)
    if tensor is None or not tracing.active(tensor[1]):
        return None
    if call.op == "mean":
        rank = len(tracing.shape(tensor[1]))
        axes = call.argument(1, "dim")
        axes = axes if isinstance(axes, (tuple, list)) else [axes]
        if rank not in (4, 5) or not all(isinstance(axis, int) for axis in axes):
            return None
        if {axis % rank for axis in axes} != set(range(2, rank)):
            return None
    return tensor


def paired(call: Call, tracing: Tracing) -> dict[Operand, int]:
    """The two activations that a call adds or multiplies; nothing for any other call.

    A product of two elementwise functions of one tensor is an activation function written out, such
    as SiLU or GELU, and no pair.
    """
    if call.op not in PAIRED or not call.outputs:
        return {}
    sides = {p: v for p, v in operands(call).items() if tracing.active(v)}
    if len(sides) != 2 or len(set(sides.values())) != 2:
        return {}
    first, second = (_elementwise_history(value, tracing) for value in sides.values())
    return {} if call.op == "mul" and first & second else sides


def _elementwise_history(value: int, tracing: Tracing) -> set[int]:
    """The values that a value is an elementwise function of, itself included."""
    found = {value}
    while True:
        call = tracing.flow.producer(value)
        before = [] if call is None else [v for v in call.inputs if tracing.active(v)]
        if call is None or call.op in PRODUCTS or len(before) != 1:
            return found
        if tracing.shape(before[0]) != tracing.shape(value):
            return found
        value = before[0]
        found.add(value)
