"""The runtimes that may run an exported file, behind one small interface."""

from __future__ import annotations

import os
import platform
import tempfile
import threading
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytorch_quant.export.engine_tensorrt import TensorRTSession
from pytorch_quant.export.ports import read_onnx
from pytorch_quant.export.session import Session, is_path
from pytorch_quant.optional import how_to_install, is_installed, require

# The module that each needs.
_MODULES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "reference": "onnx",
    "tensorrt": "tensorrt",
}
ENGINES = tuple(_MODULES)
# Protocol buffers cannot be larger than 2 GiB.
_LARGEST_PROTO = 2**31 - 2**20


def installed(engine: str) -> bool:
    """Whether the package of an engine is there, and for TensorRT a GPU as well."""
    return not absence(engine)


def absence(engine: str) -> str:
    """Why an engine cannot run on this machine, and what installs it; empty if it can."""
    if engine == "tensorrt" and not torch.cuda.is_available():
        return "needs a CUDA device, and torch finds none"
    if not is_installed(_MODULES[engine]):
        return f"not installed; install it with {how_to_install(_MODULES[engine])}"
    return ""


def check_engine(engine: str) -> None:
    """Raise unless `engine` is one of `ENGINES` and its package can be imported.

    Raises:
        ImportError: it is not installed.
        ValueError: an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    require(_MODULES[engine])


def fastest_engine() -> str:
    """OpenVINO on x86, ONNX Runtime elsewhere; the other where that one is not installed.

    Raises:
        ImportError: neither is installed.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    order = ("openvino", "onnxruntime") if x86 else ("onnxruntime", "openvino")
    engine = next(filter(installed, order), None)
    if engine is None:
        raise ImportError(
            "this needs OpenVINO or ONNX Runtime, and neither is installed; install one of them "
            f"with {how_to_install('openvino')} or {how_to_install('onnxruntime')}"
        )
    return engine


def open_session(
    model: str | os.PathLike[str] | Any,
    engine: str,
    *,
    threads: int | None = None,
    optimize: bool = True,
) -> Session:
    """Load a model into an engine.

    Args:
        model: A file, or an `onnx.ModelProto` that holds its data.
        engine: One of `ENGINES`.
        threads: How many the engine uses; by default as many as torch.
        optimize: Let ONNX Runtime rewrite the graph; the others decide for themselves.

    Raises:
        ImportError: the engine is not installed.
        OSError: the file or its external data is missing.
        RuntimeError: the engine cannot load the model.
        ValueError: an unknown engine, or no ONNX file.
    """
    check_engine(engine)
    threads = torch.get_num_threads() if threads is None else threads
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a number >= 1, got {threads!r}")
    if engine == "tensorrt":
        return TensorRTSession(model)
    kinds: dict[str, Any] = {"onnxruntime": _OnnxRuntime, "openvino": _OpenVino}
    if engine in kinds:
        return kinds[engine](model, threads, optimize)
    return _Reference(model)


def _described(model: Any) -> Any:
    return read_onnx(model, data=False) if is_path(model) else model


def _holds_fp8(model: Any) -> bool:
    import onnx

    kinds = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2)
    return any(constant.data_type in kinds for constant in model.graph.initializer)


class _OnDisk:
    """The path of a model; one in memory is written to a folder that is gone afterwards."""

    def __init__(self, model: Any) -> None:
        self._folder: Any = None
        if is_path(model):
            self.path = str(model)
            return
        import onnx

        self._folder = tempfile.TemporaryDirectory(prefix="pytorch_quant_")
        self.path = str(Path(self._folder.name) / "model.onnx")
        large = model.ByteSize() > _LARGEST_PROTO
        onnx.save(model, self.path, save_as_external_data=large)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()


class _OnnxRuntime(Session):
    def __init__(self, model: Any, threads: int, optimize: bool) -> None:
        onnxruntime = require("onnxruntime")
        described = _described(model)
        super().__init__(described)
        if any(port.dtype == torch.bfloat16 for port in self.inputs):
            raise RuntimeError(
                "ONNX Runtime takes no bfloat16 arrays; export model.float() or model.half()"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if _holds_fp8(described):
            # Further ones make integer operators of FP8 codes, which are refused afterwards, and
            # drop a Relu in front of an FP8 Q as if its codes could not be negative.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            with _OnDisk(model) as path:
                self._session = onnxruntime.InferenceSession(
                    path, options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:
            raise RuntimeError(f"ONNX Runtime cannot load the model: {error}") from error

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        feeds = {port.name: t.numpy() for port, t in zip(self.inputs, tensors, strict=True)}
        # The arrays that it returns own their memory; nothing is copied in or out.
        return [torch.from_numpy(array) for array in self._session.run(None, feeds)]


class _OpenVino(Session):
    def __init__(self, model: Any, threads: int, optimize: bool) -> None:
        openvino = require("openvino")
        super().__init__(_described(model))
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # Without it, processors with bfloat16 units run in bfloat16 what is not quantized.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            core = _openvino_core(openvino)
            with _OnDisk(model) as path:
                self._compiled = core.compile_model(core.read_model(path), "CPU", options)
        except Exception as error:
            raise RuntimeError(f"OpenVINO cannot load the model: {error}") from error
        self._idle: LifoQueue[Any] = LifoQueue()

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        # A request serves one thread at a time.
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self._compiled.create_infer_request()
        arrays = [tensor.numpy() for tensor in tensors]
        request.infer(arrays, share_inputs=True, share_outputs=True)
        # The next run of the request overwrites its results.
        results = [
            torch.from_numpy(np.array(request.get_output_tensor(i).data))
            for i in range(len(self.outputs))
        ]
        self._idle.put(request)
        return results


_CORE_LOCK = threading.Lock()
_CORES: list[Any] = []


def _openvino_core(openvino: Any) -> Any:
    """The one `openvino.Core` of this process, which is never given back.

    The CPU plugin that comes with it gives the thread a stack for signals, and when it goes puts
    back the stack that it found. Where two of them go in the order in which they came, that one is
    gone already (OpenVINO 2026.4), and the next signal, Ctrl-C or the end of a data loader's
    process, is a segmentation fault.
    """
    with _CORE_LOCK:
        if not _CORES:
            _CORES.append(openvino.Core())
        return _CORES[0]


class _Reference(Session):
    def __init__(self, model: Any) -> None:
        import onnx.reference

        model = read_onnx(model) if is_path(model) else model
        super().__init__(model)
        try:
            self._evaluator = onnx.reference.ReferenceEvaluator(model)
        except Exception as error:
            raise RuntimeError(f"onnx.reference cannot load the model: {error}") from error

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        feeds = {p.name: _to_numpy(t) for p, t in zip(self.inputs, tensors, strict=True)}
        results: Any = self._evaluator.run(None, feeds)
        return [_to_torch(np.asarray(result)) for result in results]


def _to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype != torch.bfloat16:
        return np.array(tensor.numpy())
    import ml_dtypes

    # NumPy has no bfloat16 of its own; the onnx package brings one.
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()


def _to_torch(array: np.ndarray) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
