"""The mixins under an old module path; see `pytorch_quant.nn.mixins`."""

from pytorch_quant.nn.mixins import QuantInputMixin, QuantMixin, pop_quant_desc_in_kwargs

__all__ = ["QuantInputMixin", "QuantMixin", "pop_quant_desc_in_kwargs"]
