"""Monkey patching: `torch.nn` builds quantized layers while a patch is active.

    quant_modules.initialize()
    model = resnet50()
    quant_modules.deactivate()

or, undone by itself:

    with quant_modules.initialize():
        model = resnet50()
"""

from __future__ import annotations

import difflib
import types
from collections import namedtuple
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch

from pytorch_quant import nn as quant_nn

_quant_entry = namedtuple("_quant_entry", ["orig_mod", "mod_name", "replace_mod"])

_DEFAULT_QUANT_MAP = [
    _quant_entry(torch.nn, name, getattr(quant_nn, f"Quant{name}"))
    for name in (
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "Linear",
        "LSTM",
        "LSTMCell",
        "AvgPool1d",
        "AvgPool2d",
        "AvgPool3d",
        "AdaptiveAvgPool1d",
        "AdaptiveAvgPool2d",
        "AdaptiveAvgPool3d",
    )
]
"""What `initialize` replaces; existing programs append entries to it."""

quant_map: set[_quant_entry] = set()
"""The entries that are replaced at this moment; empty without an active patch."""

Replaced = list[tuple[Any, str, Any]]

_active: list[Replaced] = []
# The classes that stood there before any patch, by module and name.
_originals: dict[tuple[int, str], Any] = {}


class Patch:
    """An active patch; as a context manager it is undone on leaving."""

    def __init__(self, replaced: Replaced) -> None:
        self._replaced = replaced

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Patches that were put on top of this one, and never taken off, go with it.
        while any(frame is self._replaced for frame in _active):
            deactivate()


def initialize(
    float_module_list: Sequence[str] | None = None,
    custom_quant_modules: Iterable[tuple[Any, str, type]] | None = None,
) -> Patch:
    """Replace float layers of `torch.nn` by quantized ones, for models built from now on.

    Patches stack: each `deactivate()` undoes the latest `initialize()`, whose arguments alone
    decide what is replaced meanwhile.

    Args:
        float_module_list: Names of layers that stay float, such as `["Linear"]`.
        custom_quant_modules: More replacements, as `(module, name, class)`:
            `[(torch.nn, "Softmax", QuantSoftmax)]`.

    Returns:
        The patch, to be used in a `with` statement or ignored.

    Raises:
        TypeError: an argument of the wrong form.
        ValueError: a name that nothing replaces.
        AttributeError: a custom entry names a layer that its module does not have.
    """
    entries = list(_DEFAULT_QUANT_MAP)
    entries += [_checked_entry(e) for e in custom_quant_modules or ()]
    kept_float = _checked_names(float_module_list, entries)

    wanted: dict[tuple[int, str], tuple[Any, Any]] = {}
    standing = [getattr(entry.orig_mod, entry.mod_name) for entry in entries]
    for entry, now in zip(entries, standing, strict=True):
        key = (id(entry.orig_mod), entry.mod_name)
        original = _originals.setdefault(key, now)
        replacement = original if entry.mod_name in kept_float else entry.replace_mod
        wanted[key] = (entry.orig_mod, replacement)

    replaced: Replaced = []
    for (_, name), (module, replacement) in wanted.items():
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, replacement)
    _active.append(replaced)
    _refresh_quant_map()
    return Patch(replaced)


def deactivate() -> None:
    """Undo the latest `initialize()`; without one, do nothing."""
    if not _active:
        return
    for module, name, previous in reversed(_active.pop()):
        setattr(module, name, previous)
    _refresh_quant_map()
    if not _active:
        _originals.clear()


def _refresh_quant_map() -> None:
    quant_map.clear()
    for module, name, _ in _active[-1] if _active else ():
        standing = getattr(module, name)
        if standing is not _originals[id(module), name]:
            quant_map.add(_quant_entry(module, name, standing))


def quantized_modules(
    float_module_list: Sequence[str] | None = None,
    custom_quant_modules: Iterable[tuple[Any, str, type]] | None = None,
) -> Patch:
    """`initialize` under the name that reads well in a `with` statement."""
    return initialize(float_module_list, custom_quant_modules)


def _checked_entry(entry: Any) -> _quant_entry:
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 3:
        raise TypeError(
            f"a custom quant module is (module, name, class), such as "
            f'(torch.nn, "Softmax", QuantSoftmax); got {entry!r}'
        )
    module, name, replacement = entry
    if not isinstance(name, str) or not isinstance(replacement, type):
        raise TypeError(f"a custom quant module is (module, name, class); got {entry!r}")
    if not hasattr(module, name):
        where = module.__name__ if isinstance(module, types.ModuleType) else repr(module)
        raise AttributeError(f"{where} has no layer {name!r} to replace")
    return _quant_entry(module, name, replacement)


def _checked_names(names: Sequence[str] | None, entries: list[_quant_entry]) -> set[str]:
    if names is None:
        return set()
    if isinstance(names, str):
        raise TypeError(f"float_module_list is a list of names, got the string {names!r}")
    valid = list(dict.fromkeys(entry.mod_name for entry in entries))
    for name in names:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"float_module_list: nothing replaces {name!r}{hint} Valid: {', '.join(valid)}"
            )
    return set(names)
