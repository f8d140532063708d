"""`pytorch_quantization.calib.calibrator`: the base class of calibrators by its old name."""

from __future__ import annotations

from pytorch_quant.calib import Calibrator

_Calibrator = Calibrator

__all__ = ["Calibrator"]
