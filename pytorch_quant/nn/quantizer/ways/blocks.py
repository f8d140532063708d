"""A range for each block of entries along one axis: the blocks are rounded as rows of a matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pytorch_quant import axes, qdq_blocks
from pytorch_quant.nn.quantizer.entered import Entered
from pytorch_quant.nn.quantizer.ways.static import Static


class Blocks:
    """See `pytorch_quant.nn.quantizer.ways`; `way` is that of the rows."""

    def __init__(self, way: Static) -> None:
        self.way = way

    def enter(self, quantizer: Any, x: Tensor, amax: Tensor | None) -> Entered:
        """The blocks as rows, and a range for each of them."""
        axis, size = quantizer._axis, quantizer._block_size
        rows = axes.to_groups(x, axis, size)
        amax = quantizer._range_for(rows, 0, amax)
        if amax.dim():
            amax = amax.reshape(-1, 1)
        return Entered(x, rows, amax, quantizer.format, self.way.scale_dtype(x), axis, size)

    def quantize(self, quantizer: Any, entered: Entered) -> Tensor:
        """What the way of the rows gives, in the shape that came."""
        return entered.in_shape(self.way.quantize(quantizer, entered))

    def write(self, quantizer: Any, x: Tensor) -> Tensor:
        """A pair of opset 21, with scales of blocks."""
        axis, size, fmt = quantizer._axis, quantizer._block_size, quantizer.format
        qdq_blocks.check_blocks(x, axis, size)
        amax = quantizer._range_to_write(axes.to_groups(x, axis, size), 0)
        dtype = self.way.scale_dtype(x)
        return qdq_blocks.quantize_dequantize_blocks(x, amax, axis, size, fmt, scale_dtype=dtype)
