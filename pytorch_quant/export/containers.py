"""Containers of tensors as JSON and back: what a model takes and returns, kept in its file."""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor


def described(value: Any, where: str) -> Any:
    """The structure of `value` without its tensors, as JSON holds it.

    Args:
        value: Tensors, None, numbers and strings, in tuples, lists, mappings, named tuples and
            dataclasses.
        where: What it is, for the error.

    Raises:
        TypeError: something else is in it.
    """
    if isinstance(value, Tensor):
        return ["tensor"]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["constant", value]
    kind = type(value)
    names = _fields(value)
    if names is not None:
        parts = [described(getattr(value, name), where) for name in names]
        return [
            "fields",
            kind.__module__,
            kind.__qualname__,
            isinstance(value, tuple),
            names,
            parts,
        ]
    if isinstance(value, (list, tuple)):
        parts = [described(item, where) for item in value]
        return ["list" if isinstance(value, list) else "tuple", parts]
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        return ["dict", [[key, described(item, where)] for key, item in value.items()]]
    raise TypeError(
        f"{where} holds a {kind.__name__}, which no file can bring back; use tensors in tuples, "
        "lists, dicts, named tuples or dataclasses"
    )


def rebuilt(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """The containers that `described` saw, filled with other tensors.

    A class is found if its module is imported; a stand-in with the same names of fields is made
    otherwise, as a file must not decide what is imported.
    """
    kind, *rest = structure
    if kind == "tensor":
        return next(tensors)
    if kind == "constant":
        return rest[0]
    if kind in ("list", "tuple"):
        items = [rebuilt(part, tensors) for part in rest[0]]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {key: rebuilt(part, tensors) for key, part in rest[0]}
    module, name, is_tuple, names, parts = rest
    values = [rebuilt(part, tensors) for part in parts]
    return _class(module, name, is_tuple, names)(**dict(zip(names, values, strict=True)))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of `value`, in the order in which `rebuilt` takes them."""
    if isinstance(value, Tensor):
        yield value
        return
    names = _fields(value)
    if names is not None:
        parts: Any = [getattr(value, name) for name in names]
    elif isinstance(value, Mapping):
        parts = value.values()
    else:
        parts = value if isinstance(value, (list, tuple)) else ()
    for part in parts:
        yield from tensors_of(part)


def _fields(value: Any) -> list[str] | None:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(value._fields)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [part.name for part in dataclasses.fields(value) if part.init]
    return None


def _class(module: str, name: str, is_tuple: bool, names: list[str]) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    right = isinstance(found, type) and (
        list(getattr(found, "_fields", ())) == names
        if is_tuple
        else dataclasses.is_dataclass(found)
    )
    if right:
        return found
    if is_tuple:
        return collections.namedtuple(name.rpartition(".")[2], names)
    return SimpleNamespace
