"""Float parameters as they were before bias correction or adaptive rounding changed them.

A layer holds what was replaced, in main memory, with a checksum of what was written. A parameter
that has changed since, by training or by a checkpoint that was loaded, is its own original again.
Copies and pickles of the layer hold it as well; a state_dict does not.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HELD = "_float_originals"


def original(layer: Any, key: str) -> Tensor | None:
    """The parameter `key` of `layer` in the original float model, on the CPU; None if it had none.

    Without a change that is known this is a copy of the parameter.
    """
    present = layer._parameters[key]
    if present is None:
        return None
    value, written = _held(layer).get(key, (None, None))
    if written is not None and written == _checksum(present):
        return value
    return present.detach().to("cpu", copy=True)


def remember(layer: Any, key: str, value: Tensor | None) -> None:
    """Note that `value`, from `original`, is what the parameter as it is now has replaced."""
    # A new dict: shallow copies of the layer share the one before.
    setattr(layer, _HELD, _held(layer) | {key: (value, _checksum(layer._parameters[key]))})


def remembers(layer: Any, key: str) -> bool:
    """Whether a change of the parameter `key` was noted, even one that no longer holds."""
    return key in _held(layer)


@contextmanager
def original_parameters(model: nn.Module) -> Iterator[None]:
    """Let every layer of `model` run with its original parameters."""
    swapped = []
    try:
        for layer in model.modules():
            for key in _held(layer):
                present = layer._parameters.get(key)
                if present is None:
                    continue
                value: Any = original(layer, key)
                if value is not None:
                    value = nn.Parameter(value.to(present.device), requires_grad=False)
                swapped.append((layer, key, present))
                layer._parameters[key] = value
        yield
    finally:
        for layer, key, present in swapped:
            layer._parameters[key] = present


def _held(layer: Any) -> dict[str, tuple[Tensor | None, int]]:
    return vars(layer).get(_HELD, {})


def _checksum(parameter: Tensor) -> int:
    flat = parameter.detach().cpu().contiguous().reshape(-1)
    # Before Python 3.12 an array is not typed as a buffer.
    raw: Any = flat.view(torch.uint8).numpy()
    return zlib.crc32(raw)
