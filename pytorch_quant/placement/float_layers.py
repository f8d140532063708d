"""What stays float in TensorRT although it could run in int8: heuristics H1 to H5.

They are about speed and about which integer kernels exist, and hold for default schemes only: a
rule that chose a layer is followed. H4 concerns FP8, which no default has; it holds for all but
exact names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytorch_quant.placement.rules import Choice

LONGEST_SEQUENCE = 512
"""The most keys that the fused int8 attention of TensorRT takes."""

_FEW = 16


@dataclass(frozen=True)
class ConvShape:
    """The sizes of a convolution that decide.

    Attributes:
        c_in: Input channels of each group, the second axis of the weight.
        c_out: Output channels.
        kernel: The spatial sizes of the weight.
        groups: Groups.
        first: It is the first convolution of the network and takes an image: 4 channels or fewer.
    """

    c_in: int
    c_out: int
    kernel: tuple[int, ...]
    groups: int
    first: bool = False


@dataclass(frozen=True)
class ProductShape:
    """`(M, K) x (K, N)`; None where a size is unknown or may hold the batch.

    Attributes:
        m: Rows. Of a product with a weight always None, because they hold the batch: whether
            `(8, 1, K)` is eight samples of one token, or eight tokens of one sample, cannot be
            seen, and a plan must not depend on the batch size of the example.
        k: The summed axis.
        n: Columns.
        keys: Of an attention product, the length of the softmax.
    """

    m: int | None
    k: int | None
    n: int | None
    keys: int | None = None


def reason_to_leave(shape: ConvShape | ProductShape | None, choice: Choice) -> str | None:
    """Why a layer or call stays float, or None if it does not.

    Args:
        shape: Its sizes; None has no rule.
        choice: Its scheme, which is not None, and where that comes from.
    """
    if shape is None or choice.scheme is None:
        return None
    if isinstance(shape, ConvShape) and choice.scheme.weight is not None:
        if isinstance(choice.scheme.weight.num_bits, tuple):
            return None if choice.kind == "exact" else _fp8_convolution(shape)
        return None if choice.explicit else _int8_convolution(shape)
    if isinstance(shape, ProductShape) and not choice.explicit:
        return _product(shape)
    return None


def _int8_convolution(shape: ConvShape) -> str | None:
    if shape.c_in >= _FEW and shape.c_out >= _FEW:
        return None
    if shape.groups > 1:
        if shape.c_out % 8 == 0 and all(size >= 3 for size in shape.kernel):
            return None
    else:
        # "First layer or >= 16" is read as a condition on the input channels: kernels for few
        # input channels exist for images alone.
        even = shape.c_out % 8 == 0 or shape.c_in % 8 == 0
        square = len(set(shape.kernel)) == 1
        if even and square and (shape.first or shape.c_in >= _FEW):
            return None
    kernel = "x".join(map(str, shape.kernel))
    groups = f", {shape.groups} groups" if shape.groups > 1 else ""
    return f"{shape.c_in} -> {shape.c_out} channels, kernel {kernel}{groups}: no fast kernel (H3)"


def _fp8_convolution(shape: ConvShape) -> str | None:
    if shape.c_in <= _FEW or shape.c_out <= _FEW:
        return f"{shape.c_in} -> {shape.c_out} channels, too few for FP8 (H4)"
    if math.prod(shape.kernel) > 32:
        return f"a kernel of {math.prod(shape.kernel)} taps, too large for FP8 (H4)"
    return None


def _product(shape: ProductShape) -> str | None:
    if shape.keys is not None and shape.keys > LONGEST_SEQUENCE:
        return f"attention over {shape.keys} keys, more than {LONGEST_SEQUENCE} (H5)"
    for letter, size in (("M", shape.m), ("N", shape.n)):
        if size == 1:
            return f"{letter} = 1: a product of a vector (H1)"
    for letter, size in (("K", shape.k), ("N", shape.n)):
        if size is not None and size < _FEW:
            return f"{letter} = {size}, below {_FEW} (H2)"
    return None
