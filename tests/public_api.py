"""The public API as text: names, signatures, methods and properties.

    python tests/public_api.py

writes it to tests/public_api.txt, which `test_public_api.py` compares with the package. It lists
what users and existing programs import: the names of the documented modules, those that
docs/reference shows, and the modules of pytorch_quantization as the alias gives them. Left out is
what differs between versions of Python and torch: annotations, and what comes from elsewhere.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pytorch_quant import QuantDescriptor, Scheme, install_as_pytorch_quantization
from pytorch_quant.compat import alias

FILE = Path(__file__).with_suffix(".txt")
REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
DOCUMENTED = (
    "pytorch_quant",
    "pytorch_quant.nn",
    "pytorch_quant.nn.functional",
    "pytorch_quant.quant_modules",
    "pytorch_quant.calib",
    "pytorch_quant.ptq",
    "pytorch_quant.improve",
    "pytorch_quant.qat",
    "pytorch_quant.optim.helper",
    "pytorch_quant.analysis",
    "pytorch_quant.export",
    "pytorch_quant.export.lint",
    "pytorch_quant.models",
    "pytorch_quant.compat",
    "pytorch_quant.tensor_quant",
)


def api() -> str:
    """The whole API, a section for each module."""
    places: dict[int, str] = {}
    sections = {name: _names(importlib.import_module(name)) for name in DOCUMENTED}
    for dotted in _in_reference():
        module, _, name = dotted.rpartition(".")
        if name not in sections.setdefault(module, []):
            sections[module].append(name)
    lines = []
    for name, names in sections.items():
        lines += _section(importlib.import_module(name), name, sorted(names), places)
    install_as_pytorch_quantization()
    try:
        for path, target in sorted(alias.TARGETS.items()):
            names = _names(importlib.import_module(target))
            lines += _section(importlib.import_module(path), path, sorted(names), places)
    finally:
        alias.uninstall()
    return "\n".join(_wrapped(line) for line in lines[1:]) + "\n"


def _wrapped(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 8)
    return textwrap.fill(line, 100, subsequent_indent=indent, break_on_hyphens=False)


def _names(module: ModuleType) -> list[str]:
    """`__all__`, or what a module defines itself."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    names = []
    for statement in ast.parse(inspect.getsource(module)).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.append(statement.name)
        elif isinstance(statement, ast.Assign):
            names += [target.id for target in statement.targets if isinstance(target, ast.Name)]
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.append(statement.target.id)
    return [
        name
        for name in names
        if (name[0] != "_" or name == "__version__") and not _is_alias(getattr(module, name))
    ]


def _is_alias(value: Any) -> bool:
    """Whether it is a type for annotations, such as `list[int]`."""
    return typing.get_origin(value) is not None


def _in_reference() -> list[str]:
    pages = sorted(REFERENCE.glob("*.md"))
    pattern = r"^\.\. auto(?:function|class|data|exception):: (pytorch_quant\S*)"
    return [name for page in pages for name in re.findall(pattern, page.read_text(), re.MULTILINE)]


def _section(module: ModuleType, path: str, names: list[str], places: dict[int, str]) -> list[str]:
    lines = ["", f"[{path}]"]
    for name in names:
        value = getattr(module, name)
        place = places.get(id(value))
        if place is not None:
            lines.append(f"{name} is {place}")
            continue
        if callable(value):
            places[id(value)] = f"{path}.{name}"
        lines += _described(name, value)
    return lines


def _described(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, ModuleType):
        yield f"module {name}"
    elif inspect.isclass(value):
        bases = [b.__name__ for b in value.__mro__ if not _is_ours(b) and b is not object]
        constructor = _constructor(value)
        signature = "" if constructor is None else _signature(constructor, bound=True)
        yield f"class {name}{signature}" + (f", a {bases[0]}" if bases else "")
        yield from (f"    {line}" for line in _members(value))
    elif callable(value):
        yield f"def {name}" + (_signature(value) if _is_ours(value) else f" of {value.__module__}")
    elif isinstance(value, (QuantDescriptor, Scheme)):
        yield f"{name} = {value!r}"
    else:
        yield f"{name}: {type(value).__name__}"


def _is_ours(value: Any) -> bool:
    return value.__module__.partition(".")[0] == "pytorch_quant"


def _constructor(kind: type) -> Any:
    """The first `__init__` or `__new__` of a class, if it is ours."""
    for base in kind.__mro__:
        for name in ("__init__", "__new__"):
            if name in vars(base):
                return vars(base)[name] if _is_ours(base) else None
    return None


def _members(kind: type) -> list[str]:
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    found: dict[str, str] = {}
    for base in kind.__mro__:
        if not _is_ours(base):
            continue
        for name, value in vars(base).items():
            if name[0] != "_" and name not in fields:
                found.setdefault(name, _member(name, value))
    return [found[name] for name in sorted(found)]


def _member(name: str, value: Any) -> str:
    if isinstance(value, property):
        return f"property {name}" + ("" if value.fset is None else ", can be set")
    if isinstance(value, functools.cached_property):
        return f"property {name}"
    if isinstance(value, classmethod):
        return f"classmethod {name}{_signature(value.__func__, bound=True)}"
    if isinstance(value, staticmethod):
        return f"staticmethod {name}{_signature(value.__func__)}"
    if callable(value):
        return f"def {name}{_signature(value, bound=True)}"
    return f"{name} = {_shown(value)}"


class _Default:
    """A default value with a text that is the same in every process."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        return _shown(self._value)


def _shown(value: Any) -> str:
    if isinstance(value, Scheme):
        return value.name
    if isinstance(value, (tuple, list)):
        inside = ", ".join(map(_shown, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return type(value).__name__ if " at 0x" in repr(value) else repr(value)


def _signature(function: Any, bound: bool = False) -> str:
    """The parameters without annotations; without the first if the function is `bound`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return "(...)"
    empty = inspect.Parameter.empty
    shown = []
    for parameter in parameters[bound:]:
        default = parameter.default
        default = default if default is empty else _Default(default)
        shown.append(parameter.replace(annotation=empty, default=default))
    return str(inspect.Signature(shown))


if __name__ == "__main__":
    FILE.write_text(api(), encoding="utf-8")
    print(f"wrote {FILE}")
