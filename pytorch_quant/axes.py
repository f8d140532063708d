"""Which axes of a tensor keep their own amax, and the reductions that follow from it.

Everywhere in this package `axis` is the axis (or the axes) that is **kept**: a weight of shape
`(K, C, R, S)` with `axis=0` has one amax per output channel, of shape `(K, 1, 1, 1)`. `axis=None`
is per tensor, with an amax of shape `()`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from pytorch_quant.exporting import exporting

Axis = int | tuple[int, ...] | None


def canonical_axis(axis: int | Iterable[int] | None) -> Axis:
    """Bring an axis to the one form that is stored: None, an int, or a sorted tuple of several.

    Raises:
        TypeError: `axis` is neither None, an int, nor a collection of ints.
        ValueError: an axis is named twice.
    """
    if axis is None:
        return None
    if isinstance(axis, SupportsIndex) and not isinstance(axis, bool):
        return operator.index(axis)
    if isinstance(axis, (str, bytes, bool)) or not isinstance(axis, Iterable):
        raise TypeError(f"axis must be None, an int or a tuple of ints, got {axis!r}")
    axes = tuple(axis)
    if not axes:
        return None
    if any(isinstance(a, bool) or not isinstance(a, SupportsIndex) for a in axes):
        raise TypeError(f"axis must be None, an int or a tuple of ints, got {axis!r}")
    axes = tuple(operator.index(a) for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis {axis!r} names an axis twice")
    return axes[0] if len(axes) == 1 else tuple(sorted(axes))


def kept_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The kept axes of an `ndim`-dimensional tensor as non-negative ints, ascending.

    Raises:
        ValueError: an axis is out of range, or the same one is named twice.
    """
    if axis is None:
        return ()
    axes = (axis,) if isinstance(axis, int) else axis
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis {a} is out of range for a tensor of {ndim} dimensions; "
                f"use {-ndim} to {ndim - 1}"
                if ndim
                else f"axis {a} is out of range for a tensor of 0 dimensions; use axis=None"
            )
    kept = sorted({a % ndim for a in axes})
    if len(kept) != len(axes):
        raise ValueError(f"axis {axis!r} names an axis of a {ndim}-dimensional tensor twice")
    return tuple(kept)


def reduced_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes over which amax is taken: all that are not kept."""
    kept = kept_axes(axis, ndim)
    return tuple(a for a in range(ndim) if a not in kept)


def amax_shape(shape: Sequence[int], axis: Axis) -> tuple[int, ...]:
    """The shape of the amax of a tensor of `shape`: its rank with 1 elsewhere, or `()`."""
    if axis is None:
        return ()
    kept = kept_axes(axis, len(shape))
    return tuple(n if a in kept else 1 for a, n in enumerate(shape))


def fits_axis(shape: Sequence[int], axis: Axis) -> bool:
    """Whether an amax of `shape` can serve a quantizer with `axis`, its input unseen.

    One value serves any quantizer, and a plain list one with one kept axis; otherwise several
    values must lie along kept axes.
    """
    if all(n == 1 for n in shape) or (len(shape) == 1 and isinstance(axis, int)):
        return True
    if axis is None:
        return False
    try:
        kept = kept_axes(axis, len(shape))
    except ValueError:
        return False
    return all(n == 1 or a in kept for a, n in enumerate(shape))


def reduce_amax(x: Tensor, axis: Axis = None) -> Tensor:
    """The largest magnitude of `x`, per tensor or along the kept `axis`.

    NaN propagates. An empty tensor has amax 0.

    Args:
        x: Any shape.
        axis: The kept axis.

    Returns:
        Shape `amax_shape(x.shape, axis)`, in the dtype of `x`.

    Raises:
        ValueError: `axis` is out of range.
    """
    reduced = reduced_axes(axis, x.dim())
    shape = amax_shape(x.shape, axis)
    if x.numel() == 0:
        return x.new_zeros(shape)
    if not reduced:
        return x.abs()
    if exporting():
        # ONNX exporters translate a reduction over named dimensions only.
        return x.abs().amax(reduced, keepdim=axis is not None)
    if axis is None:
        low, high = torch.aminmax(x)
        return torch.maximum(high, -low)
    return torch.maximum(x.amax(reduced, keepdim=True), -x.amin(reduced, keepdim=True))


def varying_axis(shape: Sequence[int], axis: Axis) -> Axis:
    """The axis that an amax of this shape varies along: `axis`, unless amax was replaced.

    Args:
        shape: Of the amax.
        axis: The axis that is stored for it.
    """
    if not len(shape):
        return None
    if axis is not None:
        return axis
    varying = [a for a, n in enumerate(shape) if n != 1]
    return varying[0] if len(varying) == 1 else tuple(varying) or None


def split_blocks(x: Tensor, axis: int, block_size: int) -> Tensor:
    """View `x` with `axis` split into `(blocks, block_size)`.

    Raises:
        ValueError: the axis is out of range or its length is not a multiple of `block_size`.
    """
    (a,) = kept_axes(axis, x.dim())
    if x.shape[a] % block_size:
        raise ValueError(
            f"axis {axis} has length {x.shape[a]}, which is not a multiple of block_size="
            f"{block_size}; choose a divisor, or leave this layer per-channel"
        )
    return x.unflatten(a, (x.shape[a] // block_size, block_size))


def to_groups(x: Tensor, axis: int, block_size: int) -> Tensor:
    """Gather the blocks of `x` as the rows of a matrix of shape `(blocks, block_size)`.

    Rows run in the row-major order of the shape of `x` with `axis` divided by `block_size`, which
    is the shape that ONNX gives the scale of a block-quantized tensor.
    """
    (a,) = kept_axes(axis, x.dim())
    return split_blocks(x, axis, block_size).movedim(a + 1, -1).reshape(-1, block_size)


def from_groups(rows: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Undo `to_groups` for a tensor of `shape`."""
    (a,) = kept_axes(axis, len(shape))
    block_size = rows.shape[-1]
    grid = [n // block_size if i == a else n for i, n in enumerate(shape)]
    return rows.reshape(*grid, block_size).movedim(-1, a + 1).reshape(tuple(shape))
