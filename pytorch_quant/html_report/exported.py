"""What an exported file shows: predicted int8, lint findings, size, latency."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pytorch_quant.export import ExportReport, Prediction, export_onnx, predict_int8
from pytorch_quant.export.latency import LatencyReport, compare_latency
from pytorch_quant.export.lint import Finding, lint_onnx
from pytorch_quant.nn.modes import named_quantizers, preserved_modes

_LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class Exported:
    """What was learned from files that are gone by now.

    Attributes:
        target: The runtime that the file was for.
        export: What the export says.
        prediction: Which operators run on integers.
        findings: Rules that the file breaks.
        latency: Float beside int8; None if it was not measured.
        error: Why there is no file, or no latency; empty if nothing failed.
    """

    target: str
    export: ExportReport | None = None
    prediction: Prediction | None = None
    findings: list[Finding] = field(default_factory=list)
    latency: LatencyReport | None = None
    error: str = ""


def export_arguments(example_inputs: Any) -> tuple[Any, ...]:
    """Example inputs of `quantize` as arguments of `export_onnx`.

    Raises:
        TypeError: they are neither a tensor, a mapping, a tuple nor a list.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, Mapping):
        return (dict(example_inputs),)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    raise TypeError(
        "example_inputs is a tensor, a mapping of keywords, or a tuple or list of arguments, got "
        f"{type(example_inputs).__name__}"
    )


def look_at_export(
    model: nn.Module, args: tuple[Any, ...], target: str, *, latency: bool, progress: bool
) -> Exported:
    """Export into a temporary folder, and check the file.

    A model that cannot be exported is something to report, not a reason to report nothing: the
    message is kept in `error`.

    Args:
        model: Calibrated.
        args: As for `export_onnx`.
        target: The runtime.
        latency: Time the file beside one without quantizers.
        progress: Show a progress bar.
    """
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        path = Path(folder) / "int8.onnx"
        try:
            export = export_onnx(model, args, path, target=target)
        except Exception as error:
            return Exported(target, error=f"the export failed: {_shown(error)}")
        seen = {
            "export": export,
            "prediction": predict_int8(path, target),
            "findings": lint_onnx(path, target),
        }
        if not latency:
            return Exported(target, **seen)  # type: ignore[arg-type]
        try:
            timed = _timed(model, args, target, path, progress)
        except Exception as error:
            message = f"the latency could not be measured: {_shown(error)}"
            return Exported(target, **seen, error=message)  # type: ignore[arg-type]
    return Exported(target, **seen, latency=timed)  # type: ignore[arg-type]


def _timed(
    model: nn.Module, args: tuple[Any, ...], target: str, path: Path, progress: bool
) -> LatencyReport:
    engine = "openvino" if target == "openvino" else "onnxruntime"
    quantized = path
    if target != engine:
        # The signed form that TensorRT runs has no fast kernels on a CPU.
        quantized = path.with_name("cpu.onnx")
        export_onnx(model, args, quantized, target=engine)
    plain = path.with_name("float.onnx")
    with preserved_modes(model):
        for quantizer in named_quantizers(model).values():
            quantizer.disable()
        export_onnx(model, args, plain, target=engine)
    return compare_latency([plain, quantized], engine=engine, progress=progress)


def _shown(error: Exception) -> str:
    # The exporter of torch writes for a terminal, and at length.
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text[:_LONGEST_MESSAGE] or 'no message'}"
