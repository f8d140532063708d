"""Reading a whole ONNX file and writing one, with its external data."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from pytorch_quant.files import written_aside

# Protocol buffers end at 2 GiB; the nodes of a graph need a part of it.
LARGEST_DATA = 2**31 - 2**26
# Smaller tensors stay in the file itself, as onnx keeps them.
_SMALLEST_EXTERNAL = 1024
_ALIGNMENT = 4096


def read_model(path: str | os.PathLike[str]) -> Any:
    """The `onnx.ModelProto` of a file, external data not loaded.

    Raises:
        OSError: the file or its external data is missing or cannot be read.
        ValueError: the file is no ONNX model.
    """
    import onnx

    file = Path(os.fspath(path))
    content = file.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:
        raise ValueError(f"{file} is not an ONNX file ({error}); export one") from error
    if not model.opset_import or not (model.graph.node or model.graph.output):
        raise ValueError(f"{file} is not an ONNX file: it holds no graph; export one")
    for name in sorted(external_files(model)):
        if not (file.parent / name).is_file():
            raise FileNotFoundError(
                f"{file.parent / name} does not exist, and {file} keeps "
                f"{_kept_in(model, name)} in it; put both files into one folder"
            )
    return model


def external_files(model: Any) -> set[str]:
    """Where the initializers of a model lie, relative to its file; empty if they are inside."""
    locations = (_location(constant) for constant in model.graph.initializer)
    return {location for location in locations if location is not None}


def _location(constant: Any) -> str | None:
    return next((e.value for e in constant.external_data if e.key == "location"), None)


def _kept_in(model: Any, location: str) -> str:
    return next(c.name for c in model.graph.initializer if _location(c) == location)


def load_data(model: Any, folder: Path) -> None:
    """Load the external data of a model, in place.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is shorter than the model says.
    """
    import onnx

    for constant in model.graph.initializer:
        location = _location(constant)
        if location is None:
            continue
        try:
            onnx.external_data_helper.load_external_data_for_tensor(constant, str(folder))
            whole = onnx.numpy_helper.to_array(constant).size == math.prod(constant.dims)
        except (ValueError, onnx.checker.ValidationError) as error:
            raise ValueError(
                f"{folder / location} does not hold all of {constant.name} ({error}); it is "
                "truncated or belongs to another file: export the model again"
            ) from error
        assert whole
        constant.data_location = onnx.TensorProto.DEFAULT
        del constant.external_data[:]


def save_model(model: Any, path: str | os.PathLike[str], *, external: str | None = None) -> None:
    """Write a model aside and rename it.

    Args:
        model: An `onnx.ModelProto` with all data loaded; changed if data goes outside.
        path: The file to write.
        external: Name of the file beside `path` that takes the large constants; None keeps them
            inside, as long as they fit there.

    Raises:
        OSError: the folder cannot be written to.
    """
    # The size of a message beyond the limit cannot be asked for.
    if external is None and sum(len(c.raw_data) for c in model.graph.initializer) > LARGEST_DATA:
        external = f"{Path(path).name}.data"
    with written_aside(path) as aside:
        if external is None:
            aside.write_bytes(model.SerializeToString())
            return
        with written_aside(Path(path).parent / external) as data:
            _move_out(model, data, external)
            aside.write_bytes(model.SerializeToString())


def _move_out(model: Any, data: Path, name: str) -> None:
    import onnx

    with data.open("wb") as file:
        for constant in model.graph.initializer:
            if len(constant.raw_data) < _SMALLEST_EXTERNAL:
                continue
            file.write(bytes(-file.tell() % _ALIGNMENT))
            place = {"location": name, "offset": file.tell(), "length": len(constant.raw_data)}
            file.write(constant.raw_data)
            constant.ClearField("raw_data")
            constant.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                constant.external_data.add(key=key, value=str(value))
