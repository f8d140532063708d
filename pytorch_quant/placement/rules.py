"""The rules of `quantize`: which scheme a layer or a call gets.

    rules = {
        "*": INT8,                      # what has no other rule; a glob, so stronger than a type
        nn.Linear: INT8_PER_TENSOR,     # layers of this type, and what lies inside of such modules
        torch.matmul: None,             # this function, in any of its spellings: left float
        "encoder.layers.0*": FP8,       # `*` crosses dots and the `/` of a call site
        "head": None,                   # this module and everything below it
        "layer1.0/add#0": INT8,         # this call
    }

Weak to strong: the default (INT8), a type or function, a glob, an exact name. A name or type that
fits a module applies to all inside of it, also a type that fits the model, whose exact name is "".
A module that is reachable by several names has them all. Among exact names the nearest enclosing
module wins; within every other kind the later entry. A function with one form for each number of
dimensions, such as `F.conv1d`, means that form alone, and the layers that call it.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pytorch_quant.op_kinds import dimensions, op_kind, own_name
from pytorch_quant.scheme import INT8, PRESETS, Scheme

_ACCEPTED = (
    "rules map names, globs, nn.Module types or torch functions to a Scheme, the name of a preset "
    f"({', '.join(PRESETS)}), or None for float"
)


@dataclass(frozen=True)
class Choice:
    """What the rules say of one layer or call.

    Attributes:
        scheme: The scheme; None leaves it float.
        kind: The kind of rule that decided: `default`, `type`, `glob` or `exact`. The glob `"*"`
            sets another default and counts as one.
        aimed: The rule names this very site, its function or its type.
    """

    scheme: Scheme | None
    kind: str = "default"
    aimed: bool = False

    @property
    def explicit(self) -> bool:
        """Somebody chose this place, so that heuristics do not overrule it."""
        return self.kind != "default"


class Rules:
    """Checked rules, to be asked for each site.

    Args:
        rules: The mapping; None is empty.

    Raises:
        TypeError: not a mapping, or a key or value of a type that no rule has.
        ValueError: a string as value that names no preset.
    """

    def __init__(self, rules: Mapping[Any, Any] | None) -> None:
        if rules is None:
            rules = {}
        if not isinstance(rules, Mapping):
            raise TypeError(f"rules must be a mapping, got {type(rules).__name__}; {_ACCEPTED}")
        self._types: list[tuple[Any, Scheme | None]] = []
        self._strings: list[tuple[str, Scheme | None]] = []
        for key, value in rules.items():
            scheme = _checked_scheme(key, value)
            if isinstance(key, str):
                self._strings.append((key, scheme))
            elif (isinstance(key, type) and issubclass(key, nn.Module)) or (
                callable(key) and not isinstance(key, (type, nn.Module))
            ):
                self._types.append((key, scheme))
            else:
                raise TypeError(f"no rule can have the key {key!r}; {_ACCEPTED}")

    def bind(
        self,
        modules: Mapping[str, nn.Module],
        sites: Mapping[str, str],
        functions: Mapping[str, str] | None = None,
    ) -> BoundRules:
        """The rules for one model.

        Args:
            modules: Its modules by qualified name.
            sites: Everything that could be quantized: layers by name and calls by site, with their
                kinds of op.
            functions: The names of the functions that are called at sites.

        Raises:
            ValueError: a name or glob that fits nothing, or a scheme for a name with nothing to
                quantize.
        """
        paths = _Paths(modules)
        names = set(paths.modules) | {name for site in sites for name in paths.levels(site)[0]}
        inside = {name for site in sites for level in paths.levels(site) for name in level}
        exact: dict[str, Scheme | None] = {}
        globs: list[tuple[str, re.Pattern, Scheme | None]] = []
        for key, scheme in self._strings:
            if key in names:
                if scheme is not None and key not in inside:
                    raise ValueError(
                        f"rule {key!r}: the model has it, but nothing in it can be quantized; "
                        "remove the rule"
                    )
                exact[key] = scheme
                continue
            pattern = re.compile(fnmatch.translate(key))
            is_glob = any(c in key for c in "*?[")
            if not is_glob or not any(pattern.match(name) for name in names):
                raise ValueError(_unknown(key, is_glob, names))
            globs.append((key, pattern, scheme))
        return BoundRules(paths, exact, globs, self._types, sites, functions or {})


class BoundRules:
    """Rules that are checked against one model; made by `Rules.bind`.

    Attributes:
        idle: The types and functions of rules that fit nothing.
    """

    def __init__(
        self,
        paths: _Paths,
        exact: Mapping[str, Scheme | None],
        globs: list[tuple[str, re.Pattern, Scheme | None]],
        types: list[tuple[Any, Scheme | None]],
        sites: Mapping[str, str],
        functions: Mapping[str, str],
    ) -> None:
        self._paths = paths
        self._functions = functions
        self._exact = exact
        self._globs = globs
        self._types = types
        self.idle = [
            key
            for key, _ in types
            if not any(self._fits(key, site, op) is not None for site, op in sites.items())
        ]

    def choice(self, site: str, op: str) -> Choice:
        """The scheme of a layer or call.

        Args:
            site: The qualified name of a layer, or `module/op#k`.
            op: Its kind.
        """
        levels = self._paths.levels(site)
        for distance, level in enumerate(levels):
            named = [name for name in self._exact if name in level]
            if named:
                return Choice(self._exact[named[-1]], "exact", aimed=distance == 0)
        for key, pattern, scheme in reversed(self._globs):
            if any(pattern.match(name) for level in levels for name in level):
                return Choice(scheme, "default" if key == "*" else "glob")
        for key, scheme in reversed(self._types):
            fit = self._fits(key, site, op)
            if fit is not None:
                return Choice(scheme, "type", aimed=fit)
        return Choice(INT8)

    def _fits(self, key: Any, site: str, op: str) -> bool | None:
        """Whether a type or function means this site itself; None if it does not fit at all."""
        if not isinstance(key, type):
            return True if op_kind(key) == op and self._fits_dimensions(key, site) else None
        for distance, level in enumerate(self._paths.levels(site)):
            if any(isinstance(self._paths.modules.get(name), key) for name in level):
                return distance == 0
        return None

    def _fits_dimensions(self, key: Any, site: str) -> bool:
        name = self._functions.get(site)
        if name is None:
            # A layer has the name of the function that it calls: nn.AvgPool2d, F.avg_pool2d.
            layer = type(self._paths.modules.get(site)).__name__
            name = re.sub("(?<=[a-z])(?=[A-Z])", "_", layer).lower()
        pair = {dimensions(own_name(key)), dimensions(name)} - {""}
        return len(pair) < 2


class _Paths:
    """The names of the modules of a model, those of a shared module all of them.

    Args:
        modules: The modules, a shared one once.

    Attributes:
        modules: The modules by each of their names.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        if "" in modules:
            self.modules.update(modules[""].named_modules(remove_duplicate=False))
        names: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            names.setdefault(module, []).append(name)
        self._names = {name: names[module] for name, module in modules.items()}
        self._levels: dict[str, list[tuple[str, ...]]] = {}

    def levels(self, site: str) -> list[tuple[str, ...]]:
        """The names of a site, then those of the modules around it, nearest first."""
        if site not in self._levels:
            module, slash, call = site.rpartition("/")
            module = module if slash else site
            chains = [
                list(_enclosing(f"{name}{slash}{call if slash else ''}"))
                for name in self._names.get(module, [module])
            ]
            levels = [
                tuple(name for name in level if name) for level in itertools.zip_longest(*chains)
            ]
            # The model is the last around each of them, however long the way.
            self._levels[site] = [level for level in levels if level] + [("",)]
        return self._levels[site]


def _enclosing(site: str) -> Iterator[str]:
    """The site and the modules around it, nearest first; the last is the model itself."""
    yield site
    module, slash, _ = site.rpartition("/")
    if slash and module:
        yield module
    path = module if slash else site
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
    if site:
        yield ""


def _checked_scheme(key: Any, value: Any) -> Scheme | None:
    if value is None or isinstance(value, Scheme):
        return value
    if isinstance(value, str):
        if value in PRESETS:
            return PRESETS[value]
        near = difflib.get_close_matches(value.upper(), PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"rule {key!r}: unknown scheme {value!r}; {hint}{_ACCEPTED}")
    raise TypeError(f"rule {key!r}: got {value!r} of type {type(value).__name__}; {_ACCEPTED}")


def _unknown(key: str, is_glob: bool, names: Iterable[str]) -> str:
    what = "glob" if is_glob else "name"
    known = sorted(name for name in names if name)
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
    return (
        f"rule {key!r}: no module or call has this {what}; {hint}Calls are known only where the "
        "model ran on example inputs"
    )
