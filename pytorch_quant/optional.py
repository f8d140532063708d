"""Packages that only some functions need."""

from __future__ import annotations

import importlib
from typing import Any

_EXTRAS = {
    "PIL": "vision",
    "matplotlib": "report",
    "openvino": "openvino",
    "sklearn": "demo",
    "torchvision": "vision",
}


def require(module: str) -> Any:
    """Import an optional package.

    Args:
        module: The module to import, such as `matplotlib.pyplot`.

    Raises:
        ImportError: it is not installed, or broken; says what installs it.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        # torchvision beside a torch of another build fails with a RuntimeError of its own.
        package = module.partition(".")[0]
        extra = _EXTRAS.get(package)
        wanted = package if extra is None else f'"pytorch-quant[{extra}]"'
        raise ImportError(
            f"this needs {package}, which cannot be imported ({error}); install it with "
            f"pip install {wanted}"
        ) from error
