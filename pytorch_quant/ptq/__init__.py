"""Post-training quantization: run batches, fill every amax, switch methods without a new pass."""

from pytorch_quant.ptq.calibration import calibrate
from pytorch_quant.ptq.ranges import compute_amax
from pytorch_quant.ptq.report import CalibrationReport, QuantizerRange
from pytorch_quant.ptq.storage import load_calibration, save_calibration

__all__ = [
    "CalibrationReport",
    "QuantizerRange",
    "calibrate",
    "compute_amax",
    "load_calibration",
    "save_calibration",
]
