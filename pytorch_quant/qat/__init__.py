"""Quantization-aware training: parts that work alone, in the user's own loop.

Each changes the model in place and says so in its first sentence.
"""

from pytorch_quant.fold import freeze_batchnorm
from pytorch_quant.qat.bits import GradualBits, gradual_bits
from pytorch_quant.qat.distillation import Teacher, distill_loss
from pytorch_quant.qat.dropout import quantization_dropout
from pytorch_quant.qat.finite import check_finite
from pytorch_quant.qat.freezing import freeze_ranges, unfreeze, unfreeze_batchnorm, unfreeze_ranges
from pytorch_quant.qat.learning import (
    learn_ranges,
    parameter_groups,
    range_parameters,
    stop_learning,
)
from pytorch_quant.qat.moving import update_ranges
from pytorch_quant.qat.schedule import QATSchedule
from pytorch_quant.rematerialized import rematerialize

__all__ = [
    "GradualBits",
    "QATSchedule",
    "Teacher",
    "check_finite",
    "distill_loss",
    "freeze_batchnorm",
    "freeze_ranges",
    "gradual_bits",
    "learn_ranges",
    "parameter_groups",
    "quantization_dropout",
    "range_parameters",
    "rematerialize",
    "stop_learning",
    "unfreeze",
    "unfreeze_batchnorm",
    "unfreeze_ranges",
    "update_ranges",
]
