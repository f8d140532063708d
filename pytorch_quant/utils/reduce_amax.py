"""The largest magnitude over named axes, as existing programs call it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pytorch_quant import axes


def reduce_amax(
    input: Tensor, axis: int | Iterable[int] | None = None, keepdims: bool = True
) -> Tensor:
    """The largest magnitude of `input` over the axes that are **reduced**, without a gradient.

    The opposite convention to `pytorch_quant.axes.reduce_amax`, which names the axes that are
    kept: for a convolution weight `(K, C, R, S)`, `axis=(1, 2, 3)` gives `(K, 1, 1, 1)` here.
    NaN propagates, an empty tensor has amax 0.

    Args:
        input: Any shape.
        axis: The axes to reduce, negative ones counted from the end; None reduces all.
        keepdims: Leave reduced axes with size 1. With `axis=None` the result is `()` either way.

    Returns:
        In the dtype of `input`.

    Raises:
        TypeError: `axis` is neither None, an int, nor a collection of ints.
        ValueError: an axis is out of range or named twice.
    """
    x = input.detach()
    if axis is None:
        return axes.reduce_amax(x)
    named = axes.canonical_axis(axis)
    reduced = axes.kept_axes(named, x.dim())
    kept = tuple(a for a in range(x.dim()) if a not in reduced)
    amax = axes.reduce_amax(x, kept or None)
    if keepdims:
        return amax.reshape([n if a in kept else 1 for a, n in enumerate(x.shape)])
    return amax.reshape([x.shape[a] for a in kept])
