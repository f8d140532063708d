"""Calibration: statistics of a tensor over many batches, and the amax that follows from them."""

from pytorch_quant.calib.calibrator import Calibrator
from pytorch_quant.calib.calibrators import HistogramCalibrator, MaxCalibrator
from pytorch_quant.calib.histogram import CalibrationError, Histogram
from pytorch_quant.calib.search import entropy_amax, lp_amax, mse_amax, percentile_amax
from pytorch_quant.calib.tensorrt_cache import load_calibration_cache, read_calibration_cache
from pytorch_quant.calib.weights import calibrate_weights

__all__ = [
    "CalibrationError",
    "Calibrator",
    "Histogram",
    "HistogramCalibrator",
    "MaxCalibrator",
    "calibrate_weights",
    "entropy_amax",
    "load_calibration_cache",
    "lp_amax",
    "mse_amax",
    "percentile_amax",
    "read_calibration_cache",
]
