"""Chains of elementwise operations on the CPU, block by block.

A chain over a whole tensor reads and writes memory once for each operation. Carried out block by
block, only the first operation reads from memory and only the last one writes to it: what lies
between stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

VALUES_PER_BLOCK = 2**20
"""4 MiB of float32: two blocks stay in a usual last cache, and cutting costs next to nothing."""

_PLAIN = (Tensor, nn.Parameter)


def is_plain(*tensors: Tensor) -> bool:
    """Whether operations on these tensors run at once, and on nothing but values in memory.

    Not while something traces, transforms or records them.
    """
    return (
        all(type(t) in _PLAIN for t in tensors)
        and not torch.jit.is_tracing()
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
    )


def pays(x: Tensor, *others: Tensor) -> bool:
    """Whether `x` is worth cutting, and can be cut together with `others` of its shape.

    Args:
        x: Any tensor.
        *others: Tensors that take part in the chain; they need the layout of `x`.
    """
    return (
        x.device.type == "cpu"
        and x.numel() > VALUES_PER_BLOCK
        and is_plain(x, *others)
        and all(o.stride() == x.stride() for o in others)
        and _dense_order(x) is not None
    )


def blocks(
    values: Sequence[Tensor], ranges: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Cut tensors into blocks that fit the cache.

    Args:
        values: Tensors of one shape and layout for which `pays` holds.
        ranges: Tensors of one shape that broadcast against `values`, such as a scale.

    Yields:
        Views of the same part of each of `values`, and views of `ranges` that broadcast against
        them.
    """
    order = _dense_order(values[0])
    assert order is not None
    size = VALUES_PER_BLOCK
    if ranges[0].numel() == 1:
        single = tuple(r.reshape(()) for r in ranges)
        flat = [v.permute(order).view(-1).split(size) for v in values]
        for part in zip(*flat, strict=True):
            yield part, single
        return
    rank = values[0].dim()
    lead = (1,) * (rank - ranges[0].dim())
    spread = [r.reshape(lead + tuple(r.shape)).permute(order) for r in ranges]
    shape, kept = _merged(tuple(values[0].permute(order).shape), tuple(spread[0].shape))
    yield from _cut(
        tuple(v.permute(order).view(shape) for v in values),
        tuple(r.reshape(kept) for r in spread),
        size,
    )


def _dense_order(x: Tensor) -> tuple[int, ...] | None:
    """The order of axes in which `x` fills memory without gaps; None where there is none."""
    order = tuple(range(x.dim()))
    if x.is_contiguous():
        return order
    strides = x.stride()
    order = tuple(sorted(order, key=lambda axis: -strides[axis]))
    return order if x.permute(order).is_contiguous() else None


def _merged(shape: tuple[int, ...], kept: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Both shapes with neighbouring axes joined that vary together, so that few are left."""
    sizes: list[int] = []
    ranges: list[int] = []
    for n, k in zip(shape, kept, strict=True):
        if n == 1:
            continue
        if sizes and (k == 1) == (ranges[-1] == 1):
            sizes[-1] *= n
            ranges[-1] *= k
        else:
            sizes.append(n)
            ranges.append(k)
    return sizes, ranges


def _cut(
    values: tuple[Tensor, ...], ranges: tuple[Tensor, ...], size: int
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    first = values[0]
    if first.numel() <= size:
        yield values, ranges
        return
    varies = ranges[0].shape[0] > 1
    rows = max(1, size * first.shape[0] // first.numel())
    for begin in range(0, first.shape[0], rows):
        if rows == 1 and first.dim() > 1:
            part = tuple(v[begin] for v in values)
            yield from _cut(part, tuple(r[begin if varies else 0] for r in ranges), size)
            continue
        end = begin + rows
        part = tuple(v[begin:end] for v in values)
        yield part, tuple(r[begin:end] if varies else r for r in ranges)
