"""The mixins under an old module path; see `pytorch_quant.nn.mixins`."""

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn.mixins import QuantInputMixin, QuantMixin, pop_quant_desc_in_kwargs
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

__all__ = [
    "QuantDescriptor",
    "QuantInputMixin",
    "QuantMixin",
    "TensorQuantizer",
    "pop_quant_desc_in_kwargs",
]
