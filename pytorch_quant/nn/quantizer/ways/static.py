"""A range that was calibrated, or set: the straight-through fake quantization of `fake_quant`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytorch_quant import axes, qdq
from pytorch_quant.fake_quant import fake_quantize
from pytorch_quant.nn.quantizer.entered import Entered


class Static:
    """See `pytorch_quant.nn.quantizer.ways`."""

    def enter(self, quantizer: Any, x: Tensor, amax: Tensor | None) -> Entered:
        """The values as they are, and a range along the kept axis."""
        axes.kept_axes(quantizer._axis, x.dim())
        amax = quantizer._range_for(x, quantizer._axis, amax)
        return Entered(x, x, amax, quantizer.format, self.scale_dtype(x))

    def quantize(self, quantizer: Any, entered: Entered) -> Tensor:
        """Real values on the grid."""
        assert entered.amax is not None
        return fake_quantize(
            entered.rows, entered.amax, entered.format, scale_dtype=entered.scale_dtype
        )

    def write(self, quantizer: Any, x: Tensor) -> Tensor:
        """A Q/DQ pair."""
        axes.kept_axes(quantizer._axis, x.dim())
        amax = quantizer._range_to_write(x, quantizer._axis)
        axis = axes.varying_axis(amax.shape, quantizer._axis)
        dtype = self.scale_dtype(x)
        return qdq.quantize_dequantize(x, amax, axis, quantizer.format, scale_dtype=dtype)

    def scale_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype whose precision the scale for `x` has."""
        # Under autocast the half-precision tensors are temporary: the exported model is float32.
        autocast = torch.is_autocast_enabled(x.device.type)
        return torch.float32 if autocast else x.dtype
