"""Putting tensors that were saved back into the object that held them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def fill_fields(made: Any, fields: Iterable[str], state: Mapping[str, Tensor], what: str) -> None:
    """Copy the entries of `state` into the tensors of the same names that `made` has.

    Raises:
        ValueError: an entry is missing or of another shape, naming it and `what`.
    """
    with torch.inference_mode(False):
        for field in fields:
            empty, value = getattr(made, field), state.get(field)
            if value is None or value.shape != empty.shape:
                found = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise ValueError(
                    f"the state of {what} needs {field} of shape {tuple(empty.shape)}, got {found}"
                )
            empty.copy_(value)
