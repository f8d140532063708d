"""Writing a checked model, the large ones as two files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from pytorch_quant.export.saving import LARGEST_DATA, save_model


def save_checked(model: Any, aside: Path, path: Path) -> int:
    """Check a model and write it to `aside`; large constants go to `<name>.data` beside `path`.

    Both files are complete and checked before either has its name.

    Args:
        model: An `onnx.ModelProto`; its constants are moved out if they are large.
        aside: The file to write, which the caller renames to `path`.
        path: Where the model will be.

    Returns:
        Bytes of the file, external data included.

    Raises:
        OSError: the folder cannot be written to.
        onnx.checker.ValidationError: the model breaks the ONNX specification.
    """
    import onnx

    if data_size(model.graph) <= LARGEST_DATA:
        onnx.checker.check_model(model, full_check=True)
        save_model(model, aside)
        return aside.stat().st_size
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole, data = Path(folder) / path.name, Path(folder) / f"{path.name}.data"
        save_model(model, whole, external=data.name)
        # The checker takes no message of this size; by its path it finds the data as well.
        onnx.checker.check_model(str(whole), full_check=True)
        size = whole.stat().st_size + data.stat().st_size
        os.replace(whole, aside)
        os.replace(data, path.parent / data.name)
    return size


def data_size(graph: Any) -> int:
    """Bytes of the initializers of a graph."""
    # The size of a message beyond the limit cannot be asked for.
    return sum(len(c.raw_data) or 8 * len(c.dims) + _listed(c) for c in graph.initializer)


def _listed(constant: Any) -> int:
    fields = (constant.float_data, constant.int32_data, constant.int64_data, constant.double_data)
    return 8 * sum(map(len, fields))
