"""`fake_quant=False`: integer codes leave, not real values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytorch_quant.fake_quant import quantize
from pytorch_quant.nn.quantizer.entered import Entered
from pytorch_quant.nn.quantizer.ways.static import Static


class Codes(Static):
    """See `pytorch_quant.nn.quantizer.ways`."""

    def quantize(self, quantizer: Any, entered: Entered) -> Tensor:
        """The codes."""
        assert entered.amax is not None
        return quantize(entered.rows, entered.amax, entered.format)[0]

    def write(self, quantizer: Any, x: Tensor) -> Tensor:
        """The arithmetic itself; `export_onnx` refuses it."""
        amax = quantizer._range_to_write(x, quantizer._axis)
        return quantize(x, amax, quantizer.format)[0]

    def scale_dtype(self, x: Tensor) -> torch.dtype:
        """That of `x`, to which a program that takes codes has the scale."""
        return x.dtype
