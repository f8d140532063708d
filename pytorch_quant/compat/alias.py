"""The alias: `import pytorch_quantization` resolves to this package.

An import hook makes a module for each path of the old package. Such a module holds nothing; it
passes what is read and set on to a module of this package, so that a class is the same object by
whichever path it was imported.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import opcode
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from pytorch_quant.compat.old_version import __version__

OLD_NAME = "pytorch_quantization"

_SAME_PATH = (
    "nn",
    "nn.functional",
    "nn.modules",
    "nn.modules._utils",
    "nn.modules.clip",
    "nn.modules.quant_conv",
    "nn.modules.quant_instancenorm",
    "nn.modules.quant_linear",
    "nn.modules.quant_pooling",
    "nn.modules.quant_rnn",
    "nn.modules.tensor_quantizer",
    "calib",
    "optim",
    "optim.helper",
    "quant_modules",
    "tensor_quant",
    "utils",
    "utils.quant_logging",
    "utils.reduce_amax",
)

TARGETS = {
    OLD_NAME: "pytorch_quant.compat.old_root",
    f"{OLD_NAME}.version": "pytorch_quant.compat.old_version",
    f"{OLD_NAME}.calib.calibrator": "pytorch_quant.compat.old_calibrator",
    f"{OLD_NAME}.calib.histogram": "pytorch_quant.compat.old_histogram",
    f"{OLD_NAME}.calib.max": "pytorch_quant.calib.calibrators",
    **{f"{OLD_NAME}.{path}": f"pytorch_quant.{path}" for path in _SAME_PATH},
}
"""The modules of the old package, and what stands behind each."""


def install_as_pytorch_quantization() -> None:
    """Make `import pytorch_quantization`, and every module path below it, resolve here.

    Takes precedence over a `pytorch_quantization` that is installed. `importlib.util.find_spec`
    and `importlib.metadata.version` answer for it too. Calling it again does nothing.

    Raises:
        RuntimeError: another `pytorch_quantization` has been imported already.
    """
    for name, module in list(sys.modules.items()):
        if not _is_old(name) or isinstance(module, OldModule):
            continue
        if module is not None:
            raise RuntimeError(
                f"another {name} is imported already, from {getattr(module, '__file__', None)}; "
                "call install_as_pytorch_quantization() before the first import of it"
            )
        # None forbids an import, which is how its absence is simulated.
        del sys.modules[name]
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Undo `install_as_pytorch_quantization`, for tests."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
    for name in [n for n, m in sys.modules.items() if isinstance(m, OldModule)]:
        del sys.modules[name]


_OWN_NAMES = vars(ModuleType)["__dict__"]


class OldModule(ModuleType):
    """A module of the old package, whose names live in a module of this one."""

    _target: ModuleType

    def __init__(self, name: str, target: ModuleType) -> None:
        super().__init__(name, target.__doc__)
        super().__setattr__("_target", target)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """A copy of all names with their values, for `vars` and what else looks there first."""
        modules = [n for n in _submodules(self.__name__) if not self._has_function(n)]
        return {**vars(self._target), **_OWN_NAMES.__get__(self)} | {
            name: getattr(self, name) for name in modules
        }

    def __getattr__(self, name: str) -> Any:
        path = f"{self.__name__}.{name}"
        if path in TARGETS and not self._has_function(name):
            return importlib.import_module(path)
        if name == "__all__":
            return _public_names(self._target)
        if not _is_dunder(name) and hasattr(self._target, name):
            return getattr(self._target, name)
        hint = _hint(name, dir(self))
        if _is_importing_from(sys._getframe(1)):
            raise ImportError(
                f"cannot import name {name!r} from {self.__name__!r}; {hint}", name=self.__name__
            )
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; {hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds submodules, and sets __spec__ and the like.
        if isinstance(value, OldModule):
            if not self._has_function(name):
                super().__setattr__(name, value)
        elif _is_dunder(name):
            super().__setattr__(name, value)
        else:
            setattr(self._target, name, value)

    def __delattr__(self, name: str) -> None:
        try:
            super().__delattr__(name)
        except AttributeError:
            delattr(self._target, name)

    def _has_function(self, name: str) -> bool:
        """Whether a function has the name of a submodule, as `utils.reduce_amax` does."""
        return callable(getattr(self._target, name, None))

    def __dir__(self) -> list[str]:
        private = [n for n in vars(self._target) if n[0] == "_" and not _is_dunder(n)]
        names = _submodules(self.__name__) + private + _public_names(self._target)
        return sorted(set(names))


class _Finder:
    """Finds, makes and describes the modules of the old package; see PEP 451."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in TARGETS:
            origin = importlib.import_module(TARGETS[name]).__file__
            is_package = any(p.startswith(name + ".") for p in TARGETS)
            spec = ModuleSpec(name, self, origin=origin, is_package=is_package)  # type: ignore[arg-type]
            spec.has_location = True
            return spec
        # None would do, but for the message; other callers only ask whether a module exists.
        if _is_old(name) and sys._getframe(2).f_code.co_name == "_find_and_load_unlocked":
            parent, _, last = name.rpartition(".")
            hint = _hint(last, _submodules(parent))
            raise ModuleNotFoundError(f"No module named {name!r}; {hint}", name=name)
        return None

    def create_module(self, spec: ModuleSpec) -> OldModule:
        target = importlib.import_module(TARGETS[spec.name])
        return OldModule(spec.name, target)

    def exec_module(self, module: ModuleType) -> None:
        pass

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context
    ) -> Iterator[_OldDistribution]:
        if context.name is None or re.sub(r"[-_.]+", "_", context.name).lower() == OLD_NAME:
            yield _OldDistribution()


class _OldDistribution(importlib.metadata.Distribution):
    """What `importlib.metadata` says of the old package."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: pytorch-quantization\nVersion: {__version__}\n"
        return OLD_NAME + "\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


def _is_old(name: str) -> bool:
    return name == OLD_NAME or name.startswith(OLD_NAME + ".")


def _is_dunder(name: str) -> bool:
    """Whether a name belongs to the module itself, and not to what stands behind it."""
    return name.startswith("__") and name.endswith("__") and name != "__version__"


def _public_names(module: ModuleType) -> list[str]:
    return list(getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"])


def _submodules(parent: str) -> list[str]:
    split = [path.rpartition(".") for path in TARGETS]
    return [name for above, _, name in split if above == parent]


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    if near:
        return f"near names: {', '.join(near)}"
    return f"there are: {', '.join(n for n in sorted(names) if n[0] != '_')}"


def _is_importing_from(frame: FrameType) -> bool:
    """Whether `frame` is at the point of `from module import name` where the name is read.

    That statement replaces an AttributeError by an ImportError with a text of its own, but lets
    an ImportError through. `hasattr` needs the AttributeError.
    """
    code = frame.f_code.co_code[max(0, frame.f_lasti) :: 2]
    # A name beyond the 255th has its number in front, where Python 3.10 stops.
    operations = (c for c in code if c != opcode.EXTENDED_ARG)
    return next(operations, None) == opcode.opmap.get("IMPORT_FROM")
