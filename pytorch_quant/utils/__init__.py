"""Functions under the names that existing programs import."""

from pytorch_quant.utils import quant_logging
from pytorch_quant.utils.reduce_amax import reduce_amax

__all__ = ["quant_logging", "reduce_amax"]
