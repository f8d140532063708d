"""Export of quantized models to ONNX."""

from pytorch_quant.export.fix import FixReport, fix_onnx
from pytorch_quant.export.latency import LatencyReport, compare_latency
from pytorch_quant.export.onnx import export_onnx
from pytorch_quant.export.predict import Prediction, predict_int8
from pytorch_quant.export.report import ExportReport
from pytorch_quant.export.runtime import RuntimeModel, convert, load
from pytorch_quant.export.verify import verify_onnx
from pytorch_quant.export.verify_report import VerifyReport

__all__ = [
    "ExportReport",
    "FixReport",
    "LatencyReport",
    "Prediction",
    "RuntimeModel",
    "VerifyReport",
    "compare_latency",
    "convert",
    "export_onnx",
    "fix_onnx",
    "load",
    "predict_int8",
    "verify_onnx",
]
