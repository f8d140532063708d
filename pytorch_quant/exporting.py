"""Which exporter is running, and for which operator set."""

from __future__ import annotations

import sys
from types import FrameType

import torch


def exporting() -> bool:
    """Whether `torch.export` is running, for a file of its own or for ONNX.

    Dynamo of torch 2.8 takes `torch.compiler.is_exporting()` for True whatever it compiles for; it
    calls this function instead.
    """
    return torch.compiler.is_exporting()


def exporting_to_onnx() -> bool:
    """Whether an ONNX exporter is running, by whichever route it traces the model.

    The tracer of a strict export takes `torch.onnx.is_in_onnx_export()` for False; it calls this
    function instead.
    """
    return torch.onnx.is_in_onnx_export()


def written_opset() -> int | None:
    """The operator set that the `torch.onnx.export` which is running was asked for.

    None where it cannot be told. The exporter tells nobody, so it is read from the call stack.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.onnx"):
            asked = frame.f_locals.get("opset_version")
            if isinstance(asked, int):
                return asked
        frame = frame.f_back
    return None


# What torch.compiler.assume_constant_result sets, without the second that importing it takes.
for _function in (exporting, exporting_to_onnx, written_opset):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
