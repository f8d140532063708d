"""Quantized linear layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pytorch_quant import weight_presets
from pytorch_quant.nn.mixins import QuantWeightMixin, pop_factory_kwargs, pop_quant_desc_in_kwargs


class QuantLinear(QuantWeightMixin, nn.Linear):
    """`nn.Linear` with a quantized input and weight.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Add a bias, which stays float.
        **kwargs: `quant_desc_input`, `quant_desc_weight`, `device`, `dtype`.
    """

    default_quant_desc_weight = weight_presets.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any
    ) -> None:
        factory = pop_factory_kwargs(kwargs)
        desc_input, desc_weight = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(in_features, out_features, bias, **factory)
        self.init_quantizer(desc_input, desc_weight)

    def forward(self, input: Tensor) -> Tensor:
        """`x @ w.T + b` of the quantized input and weight."""
        quant_input, quant_weight = self._quant(input)
        return F.linear(quant_input, quant_weight, self.bias)


Linear = QuantLinear
