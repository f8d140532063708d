"""Products: the calls that multiply by a weight, and those that multiply two activations."""

from __future__ import annotations

from dataclasses import dataclass

from pytorch_quant.dataflow import Call
from pytorch_quant.einsum import MatrixProduct, matrix_product
from pytorch_quant.op_kinds import IDENTITIES, RESHAPES
from pytorch_quant.placement.float_layers import ConvShape, ProductShape
from pytorch_quant.placement.plan import Operand
from pytorch_quant.placement.tracing import CASTS, Tracing, operand

PRODUCTS = frozenset(
    {"conv", "conv_transpose", "linear", "matmul", "einsum", "scaled_dot_product_attention"}
)

PROBABILITIES: Operand = ("probabilities",)

_SECOND = ("other", "mat2", "vec", "weight", "tensor2")
# What lies between the first product of an attention and its softmax: scale, mask, position bias.
_SCORES = IDENTITIES | RESHAPES | CASTS | {"mul", "div", "add", "sub", "masked_fill", "where"}


@dataclass(frozen=True)
class Product:
    """One call that a runtime can compute in integers.

    Attributes:
        call: The call.
        activations: The ways to its activations, with their values.
        weight: The way to the weight and its value; None where both sides are activations.
        weight_axis: The axis of the weight's output channels; None is per tensor.
        summed_axis: The axis of the weight that is summed over, for blocks along it.
        shape: The sizes that decide whether it pays.
    """

    call: Call
    activations: tuple[tuple[Operand, int], ...]
    weight: tuple[Operand, int] | None = None
    weight_axis: int | None = None
    summed_axis: int | None = None
    shape: ConvShape | ProductShape | None = None

    @property
    def is_attention(self) -> bool:
        """Whether it is one call that holds both products of an attention."""
        return self.call.op == "scaled_dot_product_attention"


def find_product(call: Call, tracing: Tracing, first_conv: int | None) -> Product | None:
    """The product that a call computes.

    Args:
        call: Any call.
        tracing: The pass.
        first_conv: The index of the network's first convolution.

    Returns:
        The product; None for other calls, for products of constants, and for integer tensors.
    """
    if call.op in ("conv", "conv_transpose"):
        return _convolution(call, tracing, call.index == first_conv)
    if call.op == "linear":
        sides = operand(call, 0, "input"), operand(call, 1, "weight")
        return _product(call, tracing, *sides, transposed=True)
    if call.op == "matmul":
        return _matmul(call, tracing)
    if call.op == "einsum":
        return _einsum(call, tracing)
    if call.op == "scaled_dot_product_attention":
        return _attention(call, tracing)
    return None


def _convolution(call: Call, tracing: Tracing, first: bool) -> Product | None:
    x, w = operand(call, 0, "input"), operand(call, 1, "weight")
    if x is None or w is None or not tracing.active(x[1]):
        return None
    shape = tracing.shape(w[1])
    spatial = len(shape) - 2
    transposed = call.op == "conv_transpose"
    channels = call.outputs[0] if transposed else x[1]
    groups = tracing.shape(channels)[-spatial - 1] // shape[1]
    if not tracing.constant(w[1]):
        # Dynamic kernels: both tensors change with the input.
        return Product(call, (x, w)) if tracing.active(w[1]) else None
    if transposed:
        # Runtimes take one scale per output channel only without groups (W3).
        return Product(call, (x,), w, 1 if groups == 1 else None, 0)
    sizes = ConvShape(shape[1], shape[0], shape[2:], groups, first and shape[1] <= 4)
    return Product(call, (x,), w, 0, 1, sizes)


def _matmul(call: Call, tracing: Tracing) -> Product | None:
    name = getattr(call.function, "__name__", "").split(".")[0].strip("_")
    if name == "chain_matmul":
        return None
    if name.startswith(("addm", "addbmm", "baddbmm")):
        left = operand(call, 1, "mat1", "batch1", "mat")
        right = operand(call, 2, "mat2", "batch2", "vec")
    else:
        left, right = operand(call, 0, "input"), operand(call, 1, *_SECOND)
    if name == "rmatmul":
        left, right = right, left
    return _product(call, tracing, left, right, transposed=False)


def _product(
    call: Call,
    tracing: Tracing,
    left: tuple[Operand, int] | None,
    right: tuple[Operand, int] | None,
    transposed: bool,
) -> Product | None:
    """`left @ right`, or `left @ right.T` where `transposed`."""
    if left is None or right is None:
        return None
    a, b = tracing.shape(left[1]), tracing.shape(right[1])
    column = len(b) - (2 if transposed else 1)
    inner = len(b) - (1 if transposed or len(b) == 1 else 2)
    n = b[column] if len(b) > 1 else 1
    active = [tracing.active(side[1]) for side in (left, right)]
    if all(active):
        return Product(call, (left, right), shape=_activation_shape(call, tracing, a, b, n))
    if active[0] and tracing.constant(right[1]):
        axis = column if len(b) > 1 else None
        return Product(call, (left,), right, axis, inner, ProductShape(None, b[inner], n))
    if active[1] and tracing.constant(left[1]):
        # Per tensor: runtimes know channels of the second factor only (W3).
        rows = a[-2] if len(a) > 1 else 1
        sizes = ProductShape(None, a[-1], rows)
        return Product(call, (right,), left, None, len(a) - 1, sizes)
    return None


def _activation_shape(
    call: Call, tracing: Tracing, a: tuple[int, ...], b: tuple[int, ...], n: int
) -> ProductShape | None:
    if len(a) < 3 or len(b) < 3:
        # One of the two axes may be the batch.
        return None
    keys = None
    if _reaches_softmax(call, tracing):
        keys = n
    elif _comes_from_softmax(call.inputs[0], tracing):
        keys = a[-1]
    return ProductShape(a[-2], a[-1], n, keys)


def _einsum(call: Call, tracing: Tracing) -> Product | None:
    equation = call.args[0] if call.args else None
    listed = len(call.args) == 2 and isinstance(call.args[1], (list, tuple))
    paths: list[Operand] = [(1, 0), (1, 1)] if listed else [(1,), (2,)]
    items = call.args[1] if listed else call.args[1:]
    if not isinstance(equation, str) or len(items) != 2:
        return None
    sides = [(path, item.value) for path, item in zip(paths, items, strict=True)]
    a, b = (tracing.shape(value) for _, value in sides)
    found = matrix_product(equation, len(a), len(b))
    if found is None:
        return None
    active = [tracing.active(value) for _, value in sides]
    if all(active):
        sizes = ProductShape(*found.sizes(a, b, None), _einsum_keys(call, tracing, found))
        return Product(call, tuple(sides), shape=sizes)
    for index, term, free in ((1, found.right, found.columns), (0, found.left, found.rows)):
        if active[1 - index] and tracing.constant(sides[index][1]):
            axis = term.index(next(iter(free))) if len(free) == 1 else None
            summed = found.summed
            inner = term.index(next(iter(summed))) if len(summed) == 1 else None
            sizes = ProductShape(*found.sizes(a, b, index))
            return Product(call, (sides[1 - index],), sides[index], axis, inner, sizes)
    return None


def _einsum_keys(call: Call, tracing: Tracing, product: MatrixProduct) -> int | None:
    """The length of the softmax that an einsum stands before or behind."""
    if _reaches_softmax(call, tracing):
        return tracing.shape(call.outputs[0])[-1]
    if any(_comes_from_softmax(value, tracing) for value in call.inputs):
        return product.size(product.summed, *(tracing.shape(value) for value in call.inputs))
    return None


def _attention(call: Call, tracing: Tracing) -> Product | None:
    found = [operand(call, i, name) for i, name in enumerate(("query", "key", "value"))]
    sides = [side for side in found if side is not None]
    # A learned query is constant and is quantized all the same.
    if len(sides) < 3 or not any(tracing.active(value) for _, value in sides):
        return None
    query, keys = tracing.shape(sides[0][1]), tracing.shape(sides[1][1])
    width = min(query[-1], keys[-2], tracing.shape(sides[2][1])[-1])
    # The smallest size of either product decides for both.
    sizes = ProductShape(query[-2], width, None, keys[-2])
    return Product(call, tuple(sides), shape=sizes)


def _reaches_softmax(call: Call, tracing: Tracing) -> bool:
    value = call.outputs[0] if call.outputs else None
    while value is not None:
        readers = tracing.readers(value)
        if any(reader.op == "softmax" for reader in readers):
            return True
        onward = next((reader for reader in readers if reader.op in _SCORES), None)
        value = onward.outputs[0] if onward is not None and onward.outputs else None
    return False


def _comes_from_softmax(value: int, tracing: Tracing) -> bool:
    producer = tracing.flow.producer(value)
    while producer is not None and producer.inputs and producer.op in IDENTITIES | RESHAPES | CASTS:
        producer = tracing.flow.producer(producer.inputs[0])
    return producer is not None and producer.op == "softmax"
