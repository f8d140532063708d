"""TensorRT-style fake quantization for PyTorch: simulate, calibrate, fine-tune, export, run.

from pytorch_quant import calibrate, export_onnx, quant_modules

with quant_modules.initialize():          # torch.nn builds quantized layers in here
model = build_model()
model.load_state_dict(state)
calibrate(model, batches, method="percentile")
export_onnx(model, example_input, "model.onnx")
"""

from pytorch_quant import calib, qat, quant_modules, tensor_quant

# Not in __all__, because a star would hide the nn of torch.
from pytorch_quant import nn as nn
from pytorch_quant._version import __version__
from pytorch_quant.analysis import (
    compare_models,
    layer_errors,
    search_bits,
    sensitivity,
    summary,
)
from pytorch_quant.calib import CalibrationError
from pytorch_quant.compat import enable_onnx_export, install_as_pytorch_quantization
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.export import (
    ExportReport,
    FixReport,
    Prediction,
    RuntimeModel,
    VerifyReport,
    compare_latency,
    convert,
    export_onnx,
    fix_onnx,
    load,
    predict_int8,
    verify_onnx,
)
from pytorch_quant.export.lint import Finding, lint_onnx
from pytorch_quant.fold import fold_batchnorm, freeze_batchnorm
from pytorch_quant.html_report import ReportFile, report
from pytorch_quant.improve import adaround, bias_correction, equalize_weights, smooth_quant
from pytorch_quant.nn import TensorQuantizer
from pytorch_quant.nn.weight_cache import cached_weights
from pytorch_quant.ptq import (
    CalibrationReport,
    calibrate,
    compute_amax,
    load_calibration,
    save_calibration,
)
from pytorch_quant.quantization import placement_plan, quantize
from pytorch_quant.scheme import (
    FP8,
    INT4,
    INT4_WEIGHT_ONLY,
    INT8,
    INT8_DYNAMIC,
    INT8_PER_TENSOR,
    Scheme,
)
from pytorch_quant.versions import warn_of_untested

warn_of_untested()

__all__ = [
    "FP8",
    "INT4",
    "INT4_WEIGHT_ONLY",
    "INT8",
    "INT8_DYNAMIC",
    "INT8_PER_TENSOR",
    "CalibrationError",
    "CalibrationReport",
    "ExportReport",
    "Finding",
    "FixReport",
    "Prediction",
    "QuantDescriptor",
    "ReportFile",
    "RuntimeModel",
    "Scheme",
    "TensorQuantizer",
    "VerifyReport",
    "__version__",
    "adaround",
    "bias_correction",
    "cached_weights",
    "calib",
    "calibrate",
    "compare_latency",
    "compare_models",
    "compute_amax",
    "convert",
    "enable_onnx_export",
    "equalize_weights",
    "export_onnx",
    "fix_onnx",
    "fold_batchnorm",
    "freeze_batchnorm",
    "install_as_pytorch_quantization",
    "layer_errors",
    "lint_onnx",
    "load",
    "load_calibration",
    "placement_plan",
    "predict_int8",
    "qat",
    "quant_modules",
    "quantize",
    "report",
    "save_calibration",
    "search_bits",
    "sensitivity",
    "smooth_quant",
    "summary",
    "tensor_quant",
    "verify_onnx",
]
