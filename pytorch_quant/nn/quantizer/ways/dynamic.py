"""A range that each tensor has for itself: ONNX DynamicQuantizeLinear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytorch_quant import qdq_dynamic
from pytorch_quant.fake_quant import dynamic_quantize, fake_quantize_dynamic
from pytorch_quant.formats import IntFormat
from pytorch_quant.nn.quantizer.entered import Entered

_UINT8 = IntFormat(8, signed=False)


class Dynamic:
    """See `pytorch_quant.nn.quantizer.ways`."""

    def enter(self, quantizer: Any, x: Tensor, amax: Tensor | None) -> Entered:
        """The values as they are; they bring their range."""
        return _EnteredDynamic(x, x, None, _UINT8, torch.float32)

    def quantize(self, quantizer: Any, entered: Entered) -> Tensor:
        """Real values on the grid of uint8."""
        return fake_quantize_dynamic(entered.rows)

    def write(self, quantizer: Any, x: Tensor) -> Tensor:
        """DynamicQuantizeLinear and DequantizeLinear."""
        return qdq_dynamic.dynamic_quantize_dequantize(x)


class _EnteredDynamic(Entered):
    @property
    def scale(self) -> Tensor:
        return dynamic_quantize(self.x)[1]

    @property
    def zero_point(self) -> Tensor:
        return dynamic_quantize(self.x)[2]

    def codes(self) -> Tensor:
        return dynamic_quantize(self.x)[0]
