"""What a model's inputs look like, without their values: kept by a placed model, and made anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_example_inputs"


@dataclass(frozen=True)
class TensorLike:
    """A tensor by its form.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        device: Where it is.
        bounds: The least and the largest value of a tensor of integers, which may be indices.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    bounds: tuple[int, int] = (0, 0)


def keep_form(model: nn.Module, example_inputs: Any) -> None:
    """Let `model` remember the form of its inputs; copies and pickles of it keep it."""
    setattr(model, _ATTRIBUTE, _form(example_inputs))


def inputs_of_kept_form(model: nn.Module) -> Any:
    """Random inputs of the form that `model` remembers; None if it remembers none."""
    form = getattr(model, _ATTRIBUTE, None)
    return None if form is None else _made(form, torch.Generator().manual_seed(0))


def _form(item: Any) -> Any:
    if isinstance(item, Tensor):
        bounds = (0, 0)
        if not (item.is_floating_point() or item.is_complex()) and item.numel():
            bounds = int(item.min()), int(item.max())
        return TensorLike(tuple(item.shape), item.dtype, str(item.device), bounds)
    if isinstance(item, Mapping):
        return {key: _form(value) for key, value in item.items()}
    if type(item) in (tuple, list):
        return type(item)(_form(part) for part in item)
    return item


def _made(form: Any, generator: torch.Generator) -> Any:
    if isinstance(form, TensorLike):
        if form.dtype.is_floating_point or form.dtype.is_complex:
            made = torch.randn(form.shape, generator=generator)
        else:
            low, high = form.bounds
            made = torch.randint(low, high + 1, form.shape, generator=generator)
        return made.to(form.device, form.dtype)
    if isinstance(form, dict):
        return {key: _made(value, generator) for key, value in form.items()}
    if type(form) in (tuple, list):
        return type(form)(_made(part, generator) for part in form)
    return form
