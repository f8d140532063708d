"""The linear layer under an old module path; see `pytorch_quant.nn.linear`."""

from pytorch_quant.nn.linear import Linear, QuantLinear

__all__ = ["Linear", "QuantLinear"]
