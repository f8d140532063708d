"""Questions to a recorded pass: which values are one tensor, constant, or on one grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pytorch_quant.dataflow import Call, Dataflow, Ref
from pytorch_quant.op_kinds import MOVEMENTS
from pytorch_quant.placement.plan import Operand

CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type_as", "cpu", "cuda"})
"""Kinds that change dtype or device, or nothing."""

_WHOLE = MOVEMENTS | CASTS | {"roll", "flip"}

_GRID = (
    MOVEMENTS
    | CASTS
    | {"max_pool", "adaptive_max_pool", "relu", "roll", "flip", "repeat", "tile", "index_select"}
    | {"pixel_shuffle", "pixel_unshuffle", "channel_shuffle"}
)

# They ask for a shape or a dtype, not for values.
_UNREAD = frozenset(
    f"{start}{end}"
    for start in ("zeros", "ones", "full", "empty", "rand", "randn")
    for end in ("_like",)
) | {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}


class Tracing:
    """Answers about one pass. Values are their indices in `flow.values`.

    Args:
        flow: The pass.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._results = set(flow.outputs)
        self._constant: list[bool] = []
        self._root: list[int] = []
        self._above: list[int] = []
        for value in flow.values:
            call = flow.producer(value.index)
            inputs = () if call is None else call.inputs
            if call is None:
                self._constant.append(value.parameter is not None)
            else:
                self._constant.append(all(self._constant[i] for i in inputs))
            source = self._whole(call, value.index)
            self._root.append(value.index if source is None else self._root[source])
            # A set of calls as the bits of an integer: unions of whole histories stay cheap.
            above = 0 if call is None else 1 << call.index
            for i in inputs:
                above |= self._above[i]
            self._above.append(above)

    def _whole(self, call: Call | None, value: int) -> int | None:
        """The value that a call hands on entirely, in another order or shape at most."""
        if call is None or call.op not in _WHOLE or not call.inputs:
            return None
        old, new = self.flow.values[call.inputs[0]], self.flow.values[value]
        same = math.prod(old.shape) == math.prod(new.shape) and old.dtype == new.dtype
        return old.index if same else None

    def root(self, value: int) -> int:
        """The first value that holds the numbers of this one.

        Identities, reshapes and transposed forms of a tensor are that tensor; slices are tensors
        of their own.
        """
        return self._root[value]

    def constant(self, value: int) -> bool:
        """Whether it comes from parameters, buffers and made-up tensors alone."""
        return self._constant[value]

    def active(self, value: int) -> bool:
        """Whether it is a floating-point tensor that depends on the input."""
        return not self._constant[value] and self.flow.values[value].dtype.is_floating_point

    def shape(self, value: int) -> tuple[int, ...]:
        """Its shape."""
        return self.flow.values[value].shape

    def history(self, value: int) -> int:
        """All calls that it depends on, as a set of bits."""
        return self._above[value]

    def readers(self, value: int) -> list[Call]:
        """The calls that read the numbers of a value."""
        return [call for call in self.flow.consumers(value) if call.op not in _UNREAD]

    def returned(self, value: int) -> bool:
        """Whether the model returns it."""
        return value in self._results

    def only_reader(self, value: int) -> Call | None:
        """The one call that reads a value; None if others do or if the model returns it."""
        readers = self.readers(value)
        return readers[0] if len(readers) == 1 and not self.returned(value) else None

    def passed_on(self, call: Call, value: int) -> list[int]:
        """The results of a call that lie on the grid of its input `value` (L7); often none."""
        if not call.inputs or call.inputs[0] != value or not self._keeps_grid(call):
            return []
        return [v for v in call.outputs if self.flow.values[v].dtype.is_floating_point]

    def _keeps_grid(self, call: Call) -> bool:
        if call.op == "pad":
            return call.argument(2, "mode", "constant") == "constant" and not call.argument(
                3, "value", None
            )
        if call.op == "interpolate":
            return str(call.argument(3, "mode", "nearest")).startswith("nearest")
        if call.op in CASTS:
            return all(
                self.flow.values[v].dtype == self.flow.values[call.inputs[0]].dtype
                for v in call.outputs
            )
        return call.op in _GRID

    def hands_on(self, call: Call) -> bool:
        """Whether a call returns its first input entirely, in another shape at most."""
        return bool(call.outputs) and self._whole(call, call.outputs[0]) is not None


def operands(call: Call) -> dict[Operand, int]:
    """The tensors among the arguments of a call, by the way to them."""
    found = dict(_refs((), call.args))
    for name, item in call.kwargs.items():
        found.update(_refs((name,), item))
    return found


def _refs(path: Operand, item: Any) -> Iterator[tuple[Operand, int]]:
    if isinstance(item, Ref):
        yield path, item.value
    elif isinstance(item, (list, tuple)):
        for index, part in enumerate(item):
            yield from _refs((*path, index), part)


def operand(call: Call, position: int, *names: str) -> tuple[Operand, int] | None:
    """One tensor among the arguments, whichever way it was passed."""
    if position < len(call.args):
        item = call.args[position]
        return ((position,), item.value) if isinstance(item, Ref) else None
    for name in names:
        if isinstance(call.kwargs.get(name), Ref):
            return (name,), call.kwargs[name].value
    return None
