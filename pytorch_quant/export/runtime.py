"""`convert` and `load`: an exported model as a module that runs in ONNX Runtime or OpenVINO."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.batches import copied
from pytorch_quant.export.arguments import in_order_of_signature, split_arguments
from pytorch_quant.export.containers import described, rebuilt, tensors_of
from pytorch_quant.export.engines import check_engine, fastest_engine, open_session
from pytorch_quant.export.onnx import export_onnx
from pytorch_quant.export.ports import ports, read_onnx
from pytorch_quant.export.saving import save_model
from pytorch_quant.plain_pass import plain_forward

RUNTIMES = ("onnxruntime", "openvino")
_KEY = "pytorch_quant"


def convert(
    model: nn.Module,
    args: Any,
    engine: str = "auto",
    *,
    dynamic_batch: bool = True,
    threads: int | None = None,
) -> RuntimeModel:
    """Export `model` and return a module that runs the file, on the CPU.

    A model without enabled quantizers runs in float, and the result's `repr` says so.

    Args:
        model: Calibrated; it comes back as it was.
        args: Example inputs: a tensor, a dict of keywords, or a tuple of arguments whose last item
            may be a dict of keywords. Arguments that are no tensors become part of the file.
        engine: `"onnxruntime"` or `"openvino"`; `"auto"` takes OpenVINO on x86 and ONNX Runtime
            elsewhere, or the other one where that is not installed.
        dynamic_batch: Let the first dimension of every input vary, as far as the model allows it.
            What it does not allow is fixed to the size in `args`, and another one raises; `note`
            of the result says so, and why.
        threads: How many the engine uses; by default as many as torch.

    Raises:
        ImportError: the engine is not installed.
        RuntimeError: uncalibrated quantizers; the engine cannot run the model.
        TypeError: `args` or what the model returns cannot be kept in a file.
        ValueError: an unknown engine; quantizers that cannot be exported.
    """
    engine = _chosen(engine)
    names, values = in_order_of_signature(model, *split_arguments(args))
    signature = list(inspect.signature(model.forward).parameters)
    inputs = {n: described(v, f"argument {n!r}") for n, v in zip(names, values, strict=True)}
    with plain_forward(model, quantized=True):
        returned = model(**dict(zip(names, copied(values), strict=True)))
    outputs = described(returned, "what the model returns")
    folder = _Folder()
    path = folder.path / "model.onnx"
    shown = dict(zip(names, values, strict=True))
    problem = _export_dynamic(model, shown, path, engine) if dynamic_batch else ""
    if problem or not dynamic_batch:
        _export(model, shown, path, engine, None)
    content = {"signature": signature, "inputs": inputs, "outputs": outputs, "engine": engine}
    if problem:
        content["note"] = f"fixed shapes, as {problem}"
    proto = read_onnx(path)
    proto.metadata_props.add(key=_KEY, value=json.dumps(content))
    save_model(proto, path)
    return RuntimeModel(path, engine, threads=threads, folder=folder)


def load(
    path: str | os.PathLike[str], engine: str | None = None, *, threads: int | None = None
) -> RuntimeModel:
    """Open a file that `RuntimeModel.save` wrote, or any other ONNX file.

    Any other file takes tensors in the order or by the names of its inputs, and returns a tensor,
    or a tuple if it has several outputs.

    Args:
        path: The file.
        engine: As for `convert`; by default the one that the file was made for, or `"auto"`.
        threads: How many the engine uses; by default as many as torch.

    Raises:
        ImportError: the engine is not installed.
        OSError: the file or its external data is missing.
        RuntimeError: the engine cannot run the file.
        ValueError: no ONNX file, or an unknown engine.
    """
    if engine is None:
        engine = _content(read_onnx(path, data=False)).get("engine", "auto")
    return RuntimeModel(Path(path), _chosen(engine), threads=threads)


def _chosen(engine: str) -> str:
    if engine == "auto":
        return fastest_engine()
    if engine not in RUNTIMES:
        raise ValueError(f"engine must be one of auto, {', '.join(RUNTIMES)}, got {engine!r}")
    # Before the export, which takes longer.
    check_engine(engine)
    return engine


def _content(proto: Any) -> dict[str, Any]:
    found = next((p.value for p in proto.metadata_props if p.key == _KEY), None)
    return {} if found is None else json.loads(found)


class RuntimeModel(nn.Module):
    """A module that runs an ONNX file on the CPU, for inference.

    It takes and returns what the torch model does. Results are new tensors, which belong to the
    caller. Several threads may call it at once. A copy, by `copy` or pickle, opens the file anew.

    Args:
        path: The file.
        engine: `"onnxruntime"` or `"openvino"`.
        threads: How many the engine uses; by default as many as torch.
        folder: What keeps a temporary file alive.

    Attributes:
        path: The file.
        engine: Where it runs.
        threads: How many it uses.
        note: Why `convert` had to fix the batch size; empty where it varies or was not asked to.
    """

    def __init__(
        self, path: Path, engine: str, *, threads: int | None = None, folder: Any = None
    ) -> None:
        super().__init__()
        self.training = False
        self.path, self.engine = path, engine
        self.threads = torch.get_num_threads() if threads is None else threads
        self._folder = folder
        proto = read_onnx(path, data=False)
        self._quantized = sum(n.op_type == "DequantizeLinear" for n in proto.graph.node)
        content = _content(proto)
        self.note: str = content.get("note", "")
        given, made = ports(proto)
        self._inputs = content.get("inputs", {port.name: ["tensor"] for port in given})
        self._signature = content.get("signature", list(self._inputs))
        plain = ["tensor"] if len(made) == 1 else ["tuple", [["tensor"]] * len(made)]
        self._outputs = content.get("outputs", plain)
        self._session = open_session(path, engine, threads=self.threads)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file.

        Args:
            *args: As for the torch model: tensors on the CPU.
            **kwargs: The same.

        Returns:
            What the torch model returns.

        Raises:
            RuntimeError: a tensor is not on the CPU.
            TypeError: arguments are missing or too many; a dtype that the file does not take.
            ValueError: a shape, or an argument that is no tensor, other than the file was made for.
        """
        results = self._session.run(self._tensors(args, kwargs))
        return rebuilt(self._outputs, iter(results))

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        if len(args) > len(self._signature):
            raise TypeError(
                f"takes {len(self._signature)} argument(s), {', '.join(self._signature)}; got "
                f"{len(args)}"
            )
        given = dict(zip(self._signature, args, strict=False))
        twice = given.keys() & kwargs.keys()
        given |= kwargs
        unknown = given.keys() - self._inputs.keys()
        missing = self._inputs.keys() - given.keys()
        if twice or unknown or missing:
            problems = {"twice": twice, "not in the file": unknown, "missing": missing}
            shown = [f"{', '.join(sorted(n))} {what}" for what, n in problems.items() if n]
            raise TypeError(
                f"the file takes {', '.join(self._inputs)}; {'; '.join(shown)}. Convert the model "
                "with the arguments that it is called with"
            )
        tensors: list[Tensor] = []
        for name, expected in self._inputs.items():
            found = described(given[name], f"argument {name!r}")
            # Through JSON, as tuples have become lists there.
            if json.loads(json.dumps(found)) != expected:
                raise ValueError(
                    f"argument {name!r} was {_shown(expected)} when the model was converted, got "
                    f"{_shown(found)}; what is no tensor is part of the file: convert once for "
                    "each value"
                )
            tensors += tensors_of(given[name])
        return tensors

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, for `load`; whole or not at all.

        Raises:
            OSError: `path` cannot be written.
        """
        save_model(read_onnx(self.path), path)

    def train(self, mode: bool = True) -> RuntimeModel:
        """Accept `train(False)` and `eval()`.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise RuntimeError(
                "a converted model has no parameters to train; train the torch model, and convert "
                "it again"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> RuntimeModel:
        # Every way to move or cast a module ends here.
        probe = fn(torch.zeros(1))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise RuntimeError(
                f"a converted model runs on the CPU in the types of its file, not on "
                f"{probe.device} in {probe.dtype}; keep it as it is and move its inputs, or move "
                "the torch model and convert it again"
            )
        return self

    def __reduce__(self) -> Any:
        return _reopened, (read_onnx(self.path).SerializeToString(), self.engine, self.threads)

    def extra_repr(self) -> str:
        """A line such as `engine=openvino threads=2 42 DequantizeLinear x: (?, 3, 32, 32)`."""
        pairs = f"{self._quantized} DequantizeLinear" if self._quantized else "float, not quantized"
        inputs = ", ".join(map(str, self._session.inputs))
        shown = f"engine={self.engine}, threads={self.threads}, {pairs}, inputs: {inputs}"
        return f"{shown}; {self.note}" if self.note else shown


class _Folder:
    """A temporary folder that is removed when nobody holds this any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="pytorch_quant_"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _reopened(content: bytes, engine: str, threads: int) -> RuntimeModel:
    folder = _Folder()
    path = folder.path / "model.onnx"
    path.write_bytes(content)
    return RuntimeModel(path, engine, threads=threads, folder=folder)


def _shown(structure: Any) -> str:
    kind, *rest = structure
    return repr(rest[0]) if kind == "constant" else f"a {kind}"


def _export(model: nn.Module, given: dict[str, Any], path: Path, engine: str, shapes: Any) -> None:
    parameters = list(inspect.signature(model.forward).parameters.values())
    # Positional up to the first that is left out.
    positional: list[Any] = []
    for parameter in parameters:
        if parameter.name not in given or parameter.kind is parameter.KEYWORD_ONLY:
            break
        positional.append(given[parameter.name])
    keywords = dict(list(given.items())[len(positional) :])
    export_onnx(model, (*positional, keywords), path, target=engine, dynamic_shapes=shapes)


def _export_dynamic(model: nn.Module, given: dict[str, Any], path: Path, engine: str) -> str:
    """Export with first dimensions that vary; why the model does not allow it, or nothing."""
    tree = torch.utils._pytree
    # The exporter takes a size of 1 for a constant.
    pairs = {name: tree.tree_map(_at_least_two, value) for name, value in given.items()}
    shapes = {name: tree.tree_map(_first_varies, value) for name, value in pairs.items()}
    # Whatever is wrong with the model itself, the export of fixed shapes raises again.
    try:
        # The exporter also takes the size of a fixed reshape for one that varies.
        with plain_forward(model, quantized=True):
            model(**tree.tree_map(_twice, pairs))
    except Exception as error:
        return f"the model does not run on another batch size ({_first_line(error)})"
    try:
        _export(model, pairs, path, engine, shapes)
    except Exception as error:
        return f"its export with a varying batch size failed ({_first_line(error)})"
    tensors = [tensor for value in given.values() for tensor in tensors_of(value)]
    taken, _ = ports(read_onnx(path, data=False))
    fits = all(
        port.shape is not None
        and all(a in (None, b) for a, b in zip(port.shape, tensor.shape, strict=True))
        for port, tensor in zip(taken, tensors, strict=True)
    )
    return "" if fits else "the exporter fixed a batch size"


def _first_line(error: BaseException) -> str:
    # The exporter wraps what was raised into pages of advice.
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _at_least_two(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1:
        return value.repeat(2, *[1] * (value.dim() - 1))
    return value


def _twice(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim():
        return value.repeat(2, *[1] * (value.dim() - 1))
    return value


def _first_varies(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {0: torch.export.Dim.AUTO} if value.dim() else {}
    return None
