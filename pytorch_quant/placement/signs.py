"""Which tensors have no negative values, so that unsigned codes use the whole range for them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from pytorch_quant.dataflow import Call, Ref
from pytorch_quant.op_kinds import MOVEMENTS, own_name
from pytorch_quant.placement.sharing import Groups, Key
from pytorch_quant.placement.tracing import CASTS, Tracing

_NONNEGATIVE = frozenset({"relu", "sigmoid", "hardsigmoid", "softmax"})
_KEEP_SIGN = MOVEMENTS | CASTS | {"max_pool", "adaptive_max_pool", "avg_pool", "adaptive_avg_pool"}
_KEEP_SIGN |= {"mean", "cat", "stack", "add", "interpolate", "pad", "pixel_shuffle"}


class Signs:
    """The tensors of a pass that take unsigned codes.

    Args:
        tracing: The pass.
    """

    def __init__(self, tracing: Tracing) -> None:
        self._groups = Groups()
        self._nonnegative: list[bool] = []
        self._signed: set[Key] = set()
        for value in tracing.flow.values:
            call = tracing.flow.producer(value.index)
            self._nonnegative.append(call is not None and self._never_negative(call))

    def _never_negative(self, call: Call) -> bool:
        if call.op in _NONNEGATIVE:
            return True
        if call.op == "clamp":
            name = own_name(call.function)
            if name in ("relu6", "clamp_max"):
                return name == "relu6"
            low = call.argument(1, "min", call.kwargs.get("min_val"))
            high = call.argument(2, "max", call.kwargs.get("max_val"))
            return _is_nonnegative(low) and (high is None or _is_nonnegative(high))
        if call.op == "interpolate" and call.argument(3, "mode", "nearest") == "bicubic":
            return False
        if call.op == "pad" and call.argument(3, "value", None):
            return False
        if call.op in _KEEP_SIGN:
            given = [item for item in (*call.args, *call.kwargs.values()) if item is not None]
            if call.op == "add" and not all(
                isinstance(i, Ref) or _is_nonnegative(i) for i in given
            ):
                return False
            return bool(call.inputs) and all(self._nonnegative[v] for v in call.inputs)
        return False

    def need_sign(self, key: Key) -> None:
        """A tensor whose codes have to be signed, whatever its values."""
        self._signed.add(key)

    def agree(self, one: Key, other: Key) -> None:
        """Two tensors whose codes have to be of one type."""
        self._groups.join(one, other)

    def unsigned(self, keys: Iterable[Key], everything: Iterable[Key]) -> bool:
        """Whether a group of tensors takes unsigned codes.

        Args:
            keys: The tensors of one quantizer.
            everything: All quantized tensors, for those that have to agree with them.
        """
        classes: set[Hashable] = {self._groups.find(key) for key in keys}
        peers = [key for key in everything if self._groups.find(key) in classes]
        return all(self._may_be_unsigned(key) for key in (*keys, *peers))

    def _may_be_unsigned(self, key: Key) -> bool:
        if isinstance(key, int):
            return self._nonnegative[key] and key not in self._signed
        return isinstance(key, tuple) and key[0] == "probabilities"


def _is_nonnegative(item: Any) -> bool:
    return isinstance(item, (int, float)) and item >= 0
