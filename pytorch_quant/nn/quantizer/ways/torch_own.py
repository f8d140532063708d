"""`use_fb_fake_quant`: torch's own `fake_quantize_per_*_affine`, for integer formats."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pytorch_quant import axes
from pytorch_quant.fake_quant import torch_fake_quantize
from pytorch_quant.nn.quantizer.entered import Entered
from pytorch_quant.nn.quantizer.ways.static import Static


class TorchOwn(Static):
    """See `pytorch_quant.nn.quantizer.ways`."""

    def quantize(self, quantizer: Any, entered: Entered) -> Tensor:
        """Real values on the grid; at a tie a code may be one step from that of `Static`."""
        amax = entered.amax
        assert amax is not None
        axis = quantizer._axis if entered.block_axis is None else 0
        axis = axes.varying_axis(amax.shape, axis)
        return torch_fake_quantize(entered.rows, amax, axis, entered.format)
