"""Packages that only some functions need."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_EXTRAS = {
    "PIL": "vision",
    "matplotlib": "report",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "sklearn": "demo",
    "torchvision": "vision",
}
# What else brings the module. Nobody wants both: they overwrite each other's files.
_INSTEAD = {
    "onnxruntime": "onnxruntime-gpu serves as well: the same module, with the CUDA and TensorRT "
    "providers",
}


def how_to_install(module: str) -> str:
    """The command that installs an optional package, such as `pip install "pytorch-quant[vision]"`.

    Args:
        module: As for `require`.
    """
    package = module.partition(".")[0]
    extra = _EXTRAS.get(package)
    command = f"pip install {package}" if extra is None else f'pip install "pytorch-quant[{extra}]"'
    return f"{command}; {_INSTEAD[package]}" if package in _INSTEAD else command


def is_installed(package: str) -> bool:
    """Whether a package is there; a folder that an uninstalled one left behind is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def require(module: str) -> Any:
    """Import an optional package.

    Args:
        module: The module to import, such as `matplotlib.pyplot`.

    Raises:
        ImportError: it is not installed, or broken; says what installs it.
    """
    try:
        found = importlib.import_module(module)
        if getattr(found, "__file__", "") is None:
            # Uninstalling onnxruntime takes the code of an onnxruntime-gpu beside it along, and
            # Python imports the rest of the folder as an empty package.
            raise ModuleNotFoundError(
                "its folder holds no code: another package with files in it was uninstalled; "
                "uninstall this one too, then install it anew"
            )
        return found
    except Exception as error:
        # torchvision beside a torch of another build fails with a RuntimeError of its own.
        raise ImportError(
            f"this needs {module.partition('.')[0]}, which cannot be imported ({error}); install "
            f"it with {how_to_install(module)}"
        ) from error
