"""Post-training quantization: run batches, fill every amax, switch methods without a new pass."""

from pytorch_quant.ptq.calibration import CalibrationReport, QuantizerRange, calibrate, compute_amax

__all__ = ["CalibrationReport", "QuantizerRange", "calibrate", "compute_amax"]
