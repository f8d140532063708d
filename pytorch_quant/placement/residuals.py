"""Residual adds: which operands of an addition are quantized (L4, L8).

A runtime fuses a convolution with the add that follows it; the add then takes the integer sums as
they are, and the other operand is read from memory: in int8 if it has a quantizer. It has, wherever
the convolution itself is quantized, whatever becomes of the result: the identity is the input of
the next convolution too, which shares the quantizer, or the output of a projection, which then
writes int8 instead of float.

That the convolution is fused needs it to be the add's alone: its result, through batch norm,
rescaling by constants, ReLU and clamps, has one reader. Of two such branches the one with fewer
products since they parted is quantized; at a tie the one that is computed first, because the other
is then the one that the add can be fused to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pytorch_quant.dataflow import Call
from pytorch_quant.op_kinds import IDENTITIES
from pytorch_quant.placement.plan import Operand
from pytorch_quant.placement.tracing import CASTS, Tracing, operands

_FUSED = IDENTITIES | CASTS | {"batch_norm", "relu", "clamp"}
_AFFINE = frozenset({"mul", "div", "add", "sub"})


@dataclass(frozen=True)
class ResidualAdd:
    """An addition of two activations.

    Attributes:
        call: The call.
        sides: The ways to the two activations, with their values.
        convolutions: For each side the convolution that it comes from, if there is one and it is
            quantized.
        alone: For each side, whether the add is the only reader of that convolution.
        broadcast: The shapes differ.
    """

    call: Call
    sides: tuple[tuple[Operand, int], tuple[Operand, int]]
    convolutions: tuple[Call | None, Call | None]
    alone: tuple[bool, bool]
    broadcast: bool


def find_add(call: Call, tracing: Tracing, products: Mapping[int, bool]) -> ResidualAdd | None:
    """An addition of two activations; None for any other call, also with a scalar or a parameter.

    Args:
        call: Any call.
        tracing: The pass.
        products: Whether each product, by the index of its call, is quantized.
    """
    if call.op != "add" or call.argument(2, "alpha", 1) != 1:
        return None
    sides = [(path, v) for path, v in operands(call).items() if tracing.active(v)][:2]
    if len(sides) != 2:
        return None
    found = [_convolution(v, tracing, products) for _, v in sides]
    shapes = {tracing.shape(v) for _, v in sides}
    return ResidualAdd(
        call,
        (sides[0], sides[1]),
        (found[0][0], found[1][0]),
        (found[0][1], found[1][1]),
        len(shapes) > 1,
    )


def identity_side(add: ResidualAdd, tracing: Tracing, products: Mapping[int, bool]) -> int | None:
    """The index of the side that is quantized for TensorRT (L4); None if neither is."""
    if add.broadcast or add.sides[0][1] == add.sides[1][1]:
        return None
    fused = [c is not None and a for c, a in zip(add.convolutions, add.alone, strict=True)]
    if not any(fused):
        return None
    if not all(fused):
        return fused.index(False)
    first, second = (tracing.history(v) for _, v in add.sides)
    lengths = [_products_in(bits, products) for bits in (first & ~second, second & ~first)]
    if lengths[0] != lengths[1]:
        return lengths.index(min(lengths))
    a, b = add.convolutions
    assert a is not None and b is not None
    return 0 if a.index < b.index else 1


def _products_in(bits: int, products: Mapping[int, bool]) -> int:
    return sum(bits >> index & 1 for index in products)


def _convolution(
    value: int, tracing: Tracing, products: Mapping[int, bool]
) -> tuple[Call | None, bool]:
    """The quantized convolution behind a value, and whether nothing else reads it on the way."""
    alone = True
    while True:
        alone = alone and tracing.only_reader(value) is not None
        call = tracing.flow.producer(value)
        if call is None or not call.inputs:
            return None, False
        if call.op == "conv":
            return (call, alone) if products.get(call.index) else (None, False)
        before = [v for v in call.inputs if tracing.active(v)]
        rescaled = call.op in _AFFINE and len(before) == 1
        if not (call.op in _FUSED or rescaled) or not before:
            return None, False
        value = before[0]
