"""Rules for `quantize` in a YAML file."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pytorch_quant.files import written_aside


def read_rules(path: str | os.PathLike[str]) -> dict[str, str | None]:
    """Read a mapping of keys to the names of schemes, or null.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML, no mapping, or has keys or values of another type.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold a mapping of names to schemes, got {found!r:.80}")
    for key, value in found.items():
        if not isinstance(key, str):
            raise ValueError(
                f"{path}: YAML reads the key {key!r} as a {type(key).__name__}; put it in quotes"
            )
        if isinstance(value, str) and value.lower() in ("none", "float"):
            raise ValueError(f"{path}: {key}: to leave it float write null, got {value!r}")
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{path}: {key}: the value is the name of a scheme or null, got {value!r}"
            )
    return dict(found)


def write_rules(path: str | os.PathLike[str], rules: Mapping[str, str | None]) -> None:
    """Write rules so that `read_rules` gives the same, in their order."""
    import yaml

    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(dict(rules), sort_keys=False), encoding="utf-8")


def resolved(rules: Mapping[str, str | None], model: nn.Module) -> dict[Any, str | None]:
    """Rules with types and functions in the place of their dotted names.

    Names that the model has stay names. Otherwise a dotted name that begins with a package that is
    loaded, such as `torch` or that of the model, is a type or function; nothing is imported.

    Raises:
        ValueError: a dotted name that a loaded package does not have.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    made: dict[Any, str | None] = {}
    for key, value in rules.items():
        found = None
        if "." in key and key not in names and not set(key) & set("*?[/"):
            found = _loaded(key)
        made[key if found is None else found] = value
    return made


def _loaded(dotted: str) -> Any:
    parts = dotted.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:count]))
        if module is None:
            continue
        found: Any = module
        for part in parts[count:]:
            if not hasattr(found, part):
                near = difflib.get_close_matches(part, dir(found), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"rule {dotted!r}: neither the model has this name, nor has "
                    f"{getattr(found, '__name__', type(found).__name__)} a {part!r}{hint}"
                )
            found = getattr(found, part)
        return found
    return None
