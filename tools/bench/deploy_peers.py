"""The same networks as other toolkits quantize them, as functions to time.

A toolkit that cannot be imported, or cannot take a network, is left out with the reason.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[], object]

# Data type of activations, per-channel weights, format of the file.
STATIC_SETTINGS = {
    "QDQ, uint8, per channel": ("QUInt8", True, "QDQ"),
    "QDQ, uint8, per tensor": ("QUInt8", False, "QDQ"),
    "QOperator, uint8, per tensor": ("QUInt8", False, "QOperator"),
}


def onnxruntime_session(path: Path, threads: int) -> Any:
    """A session with default optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnxruntime_run(path: Path, image: Tensor, threads: int) -> Run:
    """One inference of a file in ONNX Runtime."""
    session = onnxruntime_session(path, threads)
    feeds = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, feeds)


def openvino_run(model: Any, image: Tensor, threads: int) -> Run:
    """One inference of a file, or of a model of OpenVINO, in OpenVINO."""
    import openvino

    core = openvino.Core()
    model = core.read_model(model) if isinstance(model, Path) else model
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    array = image.numpy()
    return lambda: request.infer([array], share_inputs=True, share_outputs=True)


def static_files(float_file: Path, images: Sequence[Tensor]) -> dict[str, Path]:
    """What ONNX Runtime's own `quantize_static` writes, by setting."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            name = onnxruntime_session(float_file, 1).get_inputs()[0].name
            self._feeds = iter([{name: image.numpy()} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    logging.getLogger().setLevel(logging.ERROR)
    ready = float_file.with_name(f"{float_file.stem}_ready.onnx")
    quant_pre_process(str(float_file), str(ready), skip_symbolic_shape=True)
    files = {}
    for name, (kind, per_channel, form) in STATIC_SETTINGS.items():
        files[name] = float_file.with_name(f"{float_file.stem}_{len(files)}.onnx")
        quantization.quantize_static(
            str(ready),
            str(files[name]),
            Reader(),
            activation_type=getattr(quantization.QuantType, kind),
            weight_type=quantization.QuantType.QInt8,
            per_channel=per_channel,
            quant_format=getattr(quantization.QuantFormat, form),
        )
    return files


def nncf_run(float_file: Path, images: Sequence[Tensor], threads: int) -> Run | None:
    """NNCF's post-training quantization on OpenVINO; None where it is not installed."""
    if importlib.util.find_spec("nncf") is None:
        return None
    import nncf  # type: ignore[import-not-found, unused-ignore]
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino.Core().read_model(float_file)
    data = nncf.Dataset([image.numpy() for image in images])
    return openvino_run(nncf.quantize(model, data), images[0], threads)


def fx_run(model: nn.Module, images: Sequence[Tensor]) -> Run:
    """PyTorch's FX graph mode with the x86 engine, traced and frozen."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "x86"
        mapping = get_default_qconfig_mapping("x86")
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model).eval(), mapping, (images[0],))
        with torch.no_grad():
            for image in images:
                prepared(image)
            converted = quantize_fx.convert_fx(prepared).eval()
            frozen = torch.jit.freeze(torch.jit.trace(converted, images[0]))
            for _ in range(3):
                frozen(images[0])

    def run() -> object:
        with torch.no_grad():
            return frozen(images[0])

    return run
