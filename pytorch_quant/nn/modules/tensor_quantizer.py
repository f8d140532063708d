"""`TensorQuantizer` under an old module path; see `pytorch_quant.nn.tensor_quantizer`."""

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

__all__ = ["QuantDescriptor", "TensorQuantizer"]
