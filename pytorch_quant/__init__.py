"""TensorRT-style fake quantization for PyTorch: simulate, calibrate, fine-tune, export, run.

from pytorch_quant import calibrate, export_onnx, quant_modules

with quant_modules.initialize():          # torch.nn builds quantized layers in here
model = build_model()
model.load_state_dict(state)
calibrate(model, batches, method="percentile")
export_onnx(model, example_input, "model.onnx")
"""

from pytorch_quant import calib, nn, quant_modules, tensor_quant
from pytorch_quant._version import __version__
from pytorch_quant.calib import CalibrationError
from pytorch_quant.compat import enable_onnx_export, install_as_pytorch_quantization
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.export import ExportReport, export_onnx
from pytorch_quant.export.lint import Finding, lint_onnx
from pytorch_quant.fold import fold_batchnorm, freeze_batchnorm
from pytorch_quant.improve import adaround, bias_correction, equalize_weights, smooth_quant
from pytorch_quant.nn import TensorQuantizer
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
    INT4_WEIGHT_ONLY,
    INT8,
    INT8_DYNAMIC,
    INT8_PER_TENSOR,
    Scheme,
)

__all__ = [
    "FP8",
    "INT4_WEIGHT_ONLY",
    "INT8",
    "INT8_DYNAMIC",
    "INT8_PER_TENSOR",
    "CalibrationError",
    "CalibrationReport",
    "ExportReport",
    "Finding",
    "QuantDescriptor",
    "Scheme",
    "TensorQuantizer",
    "__version__",
    "adaround",
    "bias_correction",
    "calib",
    "calibrate",
    "compute_amax",
    "enable_onnx_export",
    "equalize_weights",
    "export_onnx",
    "fold_batchnorm",
    "freeze_batchnorm",
    "install_as_pytorch_quantization",
    "lint_onnx",
    "load_calibration",
    "nn",
    "placement_plan",
    "quant_modules",
    "quantize",
    "save_calibration",
    "smooth_quant",
    "tensor_quant",
]
