"""What has entered a quantizer: the values that it rounds, and the range for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytorch_quant import axes
from pytorch_quant.fake_quant import compute_scale, quantize_to_codes
from pytorch_quant.formats import Format


@dataclass(eq=False)
class Entered:
    """A tensor on its way through a quantizer, from `TensorQuantizer.entering`.

    Attributes:
        x: The values after the pre-quantization scale and the clip, in the shape that came.
        rows: What is rounded: `x` itself; of a block quantizer its blocks, `(blocks, block_size)`.
        amax: The range, float32, broadcasts against `rows`; None where each tensor has its own.
        format: The number format of the codes.
        scale_dtype: The dtype whose precision the scale has.
        block_axis: The axis of `x` that is cut into blocks; None without blocks.
        block_size: Entries of a block.
    """

    x: Tensor
    rows: Tensor
    amax: Tensor | None
    format: Format
    scale_dtype: torch.dtype
    block_axis: int | None = None
    block_size: int = 0

    # Made where it is asked for: an exporter would trace it, and a learned range needs it later.
    @property
    def scale(self) -> Tensor:
        """Real units per step, float32, broadcasts against `rows`."""
        assert self.amax is not None
        return compute_scale(self.amax.detach(), self.format, self.scale_dtype)

    @property
    def zero_point(self) -> Tensor:
        """The code of 0, `()`."""
        return self.x.new_zeros(())

    def codes(self) -> Tensor:
        """The codes `q`, as float values in the shape of `x`."""
        return self.in_shape(quantize_to_codes(self.rows, self.scale, self.format))

    def as_rows(self, values: Tensor) -> Tensor:
        """`values` of the shape of `x` in that of `rows`."""
        if self.block_axis is None:
            return values
        return axes.to_groups(values, self.block_axis, self.block_size)

    def in_shape(self, rows: Tensor) -> Tensor:
        """`rows` in the shape of `x`."""
        if self.block_axis is None:
            return rows
        return axes.from_groups(rows, self.x.shape, self.block_axis)
