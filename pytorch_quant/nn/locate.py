"""Names of modules as their user knows them, for messages."""

from __future__ import annotations

import sys

from torch import nn

# Modules that exporters and tracers wrap around the user's model.
_WRAPPERS = ("torch.export", "torch._", "torch.jit", "torch.onnx", "torch.fx")


def calling_model(module: nn.Module) -> nn.Module | None:
    """The outermost model whose forward is running and that holds `module`.

    Reads the call stack, so that no module needs to know its own name; meant for the paths on
    which an error is raised.
    """
    found = None
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if (
            isinstance(owner, nn.Module)
            and owner is not found
            and not type(owner).__module__.startswith(_WRAPPERS)
            and any(m is module for m in owner.modules())
        ):
            found = owner
        frame = frame.f_back  # type: ignore[assignment]
    return found


def name_in(model: nn.Module, module: nn.Module) -> str:
    """The qualified name of `module` inside `model`."""
    for name, candidate in model.named_modules():
        if candidate is module:
            return name or type(module).__name__
    return type(module).__name__


def qualified_name(module: nn.Module) -> str:
    """The name of `module` inside the model that is calling it, else its class name."""
    model = calling_model(module)
    return type(module).__name__ if model is None else name_in(model, module)
