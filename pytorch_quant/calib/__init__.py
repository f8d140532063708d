"""Calibration: statistics of a tensor over many batches, and the amax that follows from them."""

from pytorch_quant.calib.calibrators import Calibrator, HistogramCalibrator, MaxCalibrator
from pytorch_quant.calib.histogram import CalibrationError, Histogram
from pytorch_quant.calib.search import entropy_amax, mse_amax, percentile_amax

__all__ = [
    "CalibrationError",
    "Calibrator",
    "Histogram",
    "HistogramCalibrator",
    "MaxCalibrator",
    "entropy_amax",
    "mse_amax",
    "percentile_amax",
]
