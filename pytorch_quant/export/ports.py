"""What goes into an ONNX file and what comes out, in the terms of torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pytorch_quant.export.saving import load_data, read_model
from pytorch_quant.optional import require


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: As in the file.
        dtype: None for a type that torch does not have.
        shape: None for dimensions that vary; None altogether for an unknown rank.
    """

    name: str
    dtype: torch.dtype | None
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        sizes = "unknown shape" if self.shape is None else _shown(self.shape)
        return f"{self.name!r} ({str(self.dtype).removeprefix('torch.')}, {sizes})"


def _shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"


def read_onnx(path: str | os.PathLike[str], *, data: bool = True) -> Any:
    """The `onnx.ModelProto` of a file.

    Args:
        path: The file.
        data: Read external data as well.

    Raises:
        ImportError: onnx is not installed.
        OSError: the file or its external data is missing or cannot be read.
        ValueError: it is no ONNX file, or it or its external data is cut short.
    """
    require("onnx")
    model = read_model(path)
    if data:
        load_data(model, Path(path).parent)
    return model


def ports(model: Any) -> tuple[list[Port], list[Port]]:
    """The inputs, without those that are initializers as well, and the outputs."""
    constants = {c.name for c in model.graph.initializer}
    given = [i for i in model.graph.input if i.name not in constants]
    return [_port(i) for i in given], [_port(o) for o in model.graph.output]


def _port(info: Any) -> Port:
    tensor = info.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return Port(info.name, torch_dtype(tensor.elem_type), shape)


def torch_dtype(kind: int) -> torch.dtype | None:
    """The torch dtype of an `onnx.TensorProto` data type; None where there is none."""
    import onnx

    name = onnx.TensorProto.DataType.Name(kind).lower()
    name = {"float": "float32", "double": "float64", "float8e4m3fn": "float8_e4m3fn"}.get(
        name, name
    )
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def onnx_type(dtype: torch.dtype) -> int:
    """The `onnx.TensorProto` data type of a torch dtype.

    Raises:
        ValueError: ONNX has no such type.
    """
    import onnx

    for name, kind in onnx.TensorProto.DataType.items():
        if name != "UNDEFINED" and torch_dtype(kind) == dtype:
            return int(kind)
    raise ValueError(f"ONNX has no type for {dtype}")
