"""Post-training improvement: better int8 models without training, from a few batches."""

from pytorch_quant.improve.adaptive_rounding import LayerRounding, RoundingReport, adaround
from pytorch_quant.improve.bias import BiasCorrectionReport, bias_correction
from pytorch_quant.improve.equalize import EqualizationReport, EqualizedPair, equalize_weights
from pytorch_quant.improve.smooth import SmoothedLayer, SmoothingReport, smooth_quant

__all__ = [
    "BiasCorrectionReport",
    "EqualizationReport",
    "EqualizedPair",
    "LayerRounding",
    "RoundingReport",
    "SmoothedLayer",
    "SmoothingReport",
    "adaround",
    "bias_correction",
    "equalize_weights",
    "smooth_quant",
]
