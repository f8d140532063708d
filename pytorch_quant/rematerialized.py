"""Fake-quantized tensors that the backward pass computes again instead of keeping them.

A layer keeps its fake-quantized input for the gradient of its weight, beside the float tensor that
the quantizer keeps. The one follows from the other: in the scope of `rematerialize` autograd gets a
note how to compute it in the place of the tensor (Chen et al. 2016, arXiv 1604.06174, section 3).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


class _Scopes(threading.local):
    made: dict[int, _Made] | None = None


# By thread, as the hooks of autograd are.
_SCOPES = _Scopes()


class _Made:
    """A tensor that is there now, and how to compute it again."""

    def __init__(self, y: Tensor, x: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
        # Detached, so that its memory is kept and not the graph that it comes from.
        self.x, self.x_version, self.compute = x.detach(), x._version, compute
        self.y_version = y._version
        self.alive: Any = None


class _Note:
    """What is kept of one saved tensor, a view of what was made."""

    def __init__(self, made: _Made, saved: Tensor) -> None:
        self.made = made
        self.view = saved.size(), saved.stride(), saved.storage_offset()

    def tensor(self) -> Tensor:
        made = self.made
        _check_version(made.x, made.x_version)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return made.compute(made.x).as_strided(*self.view)


@contextmanager
def rematerialize() -> Iterator[None]:
    """Keep no fake-quantized tensors for the backward pass of what runs inside.

    Around the forward pass; the backward pass may run inside or outside::

        with qat.rematerialize():
            loss = criterion(model(x), y)
        loss.backward()

    The backward pass quantizes activations and weights once more, bit for bit, so that gradients
    are the same. It saves about the third of the activations that fake quantization adds, and a
    copy of the weights, for one more pass over each.

    It acts in the thread that enters it, on eager code. Compiled code chooses by itself what to
    compute again; enter the scope around it, not inside. Where scopes of
    `torch.autograd.graph.saved_tensors_hooks` are nested, the inner one alone acts, and inside of
    `torch.utils.checkpoint` that of the checkpoint.

    Raises:
        RuntimeError: in the backward pass, where a tensor that it needs was changed in place.
    """
    made: dict[int, _Made] = {}
    before = _SCOPES.made
    _SCOPES.made = made

    def pack(saved: Tensor) -> Any:
        # Other kinds of tensors have no memory of their own.
        found = made.get(_place(saved)) if type(saved) in _PLAIN else None
        if found is not None and found.y_version == saved._version:
            return _Note(found, saved)
        return saved, None if saved.is_inference() else saved._version

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        _SCOPES.made = before


def note(y: Tensor, x: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
    """Remember, in the scope of `rematerialize`, that `y` is `compute(x)`.

    Args:
        y: A tensor with memory of its own.
        x: What it was computed of.
        compute: Gives the same values in the same layout; holds neither `x` nor `y`.
    """
    made = _SCOPES.made
    if made is None or not y.numel() or x.is_inference() or y.is_inference():
        return
    place, entry = _place(y), _Made(y, x, compute)

    def gone(_: Any) -> None:
        # Its memory may be given to another tensor now.
        if made.get(place) is entry:
            del made[place]

    entry.alive = weakref.ref(y, gone)
    made[place] = entry


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, _Note):
        return kept.tensor()
    saved, version = kept
    if version is not None:
        _check_version(saved, version)
    return saved


def _check_version(tensor: Tensor, version: int) -> None:
    # Autograd makes this check itself, but leaves it out where there are hooks.
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in "
            f"place: it is at version {tensor._version}, expected {version}; change a copy"
        )


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
