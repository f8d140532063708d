"""A model that is loaded into an engine: what all engines have in common."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pytorch_quant.export.ports import Port, ports


class Session(ABC):
    """A model that is loaded into an engine. Several threads may run it at once.

    Attributes:
        inputs: What it takes.
        outputs: What it gives.
    """

    def __init__(self, model: Any) -> None:
        self.inputs, self.outputs = ports(model)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run on tensors in the order of `inputs`.

        Returns:
            New tensors on the CPU, which share no memory with anything.

        Raises:
            RuntimeError: a tensor is not on the CPU.
            TypeError: a tensor has another dtype than the file takes.
            ValueError: the number of tensors or a shape does not fit.
        """
        check_inputs(self.inputs, tensors)
        with torch.no_grad():
            return self._run([tensor.detach().contiguous() for tensor in tensors])

    @abstractmethod
    def _run(self, tensors: list[Tensor]) -> list[Tensor]: ...


def check_inputs(expected: Sequence[Port], tensors: Sequence[Tensor]) -> None:
    """Raise unless the tensors fit the inputs of a file; see `Session.run`."""
    if len(tensors) != len(expected):
        names = ", ".join(map(str, expected)) or "none"
        raise ValueError(
            f"the file takes {len(expected)} input(s), {names}; got {len(tensors)} tensor(s)"
        )
    for port, tensor in zip(expected, tensors, strict=True):
        if tensor.device.type != "cpu":
            raise RuntimeError(
                f"input {port.name!r} is on {tensor.device}, and the engine runs on the CPU; pass "
                "batch.cpu(): nothing is moved between devices unasked"
            )
        if port.dtype is not None and tensor.dtype != port.dtype:
            raise TypeError(
                f"the file takes {port}, got {tensor.dtype}; convert it with .to({port.dtype})"
            )
        if port.shape is None:
            continue
        fits = len(port.shape) == tensor.dim() and all(
            size in (None, n) for size, n in zip(port.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"the file takes {port}, got shape {tuple(tensor.shape)}; only dimensions shown as "
                "? may vary: pass this shape, or export with dynamic_shapes"
            )


def is_path(model: Any) -> bool:
    """Whether `model` is a path, and no `onnx.ModelProto`."""
    return isinstance(model, (str, os.PathLike))
