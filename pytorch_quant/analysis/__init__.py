"""See what quantization did, rank layers, choose formats, compare models."""

from pytorch_quant.analysis.bit_search import BitPoint, BitSearch, LayerBits
from pytorch_quant.analysis.compare import compare_models
from pytorch_quant.analysis.comparison import ModelComparison, TensorDifference, WeightDifference
from pytorch_quant.analysis.layer_errors import (
    LayerError,
    LayerErrors,
    QuantizerError,
    layer_errors,
)
from pytorch_quant.analysis.ranking import LayerSensitivity, Sensitivity
from pytorch_quant.analysis.search_bits import search_bits
from pytorch_quant.analysis.sensitivity import sensitivity
from pytorch_quant.analysis.summary import ModelSummary, SummaryRow, summary
from pytorch_quant.scheme import INT4

__all__ = [
    "INT4",
    "BitPoint",
    "BitSearch",
    "LayerBits",
    "LayerError",
    "LayerErrors",
    "LayerSensitivity",
    "ModelComparison",
    "ModelSummary",
    "QuantizerError",
    "Sensitivity",
    "SummaryRow",
    "TensorDifference",
    "WeightDifference",
    "compare_models",
    "layer_errors",
    "search_bits",
    "sensitivity",
    "summary",
]
