"""The layers under the module paths that existing programs import."""

from pytorch_quant.nn.modules import (
    _utils,
    clip,
    quant_conv,
    quant_instancenorm,
    quant_linear,
    quant_pooling,
    quant_rnn,
    tensor_quantizer,
)

__all__ = [
    "_utils",
    "clip",
    "quant_conv",
    "quant_instancenorm",
    "quant_linear",
    "quant_pooling",
    "quant_rnn",
    "tensor_quantizer",
]
