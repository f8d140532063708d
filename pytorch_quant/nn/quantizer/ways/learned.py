"""A range that training learns as a parameter: the gradients of `learned_range`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pytorch_quant.learned_range import learned_fake_quantize
from pytorch_quant.nn.quantizer.entered import Entered
from pytorch_quant.nn.quantizer.ways.static import Static


class Learned(Static):
    """See `pytorch_quant.nn.quantizer.ways`."""

    def quantize(self, quantizer: Any, entered: Entered) -> Tensor:
        """Real values on the grid, with gradients to the range."""
        assert entered.amax is not None
        return learned_fake_quantize(
            entered.rows,
            entered.amax,
            entered.format,
            quantizer._range_method,
            weight=quantizer._range_of_weight,
            scale_dtype=entered.scale_dtype,
        )
