"""What one quantizer does to the tensors that it sees, summed over a pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant import axes
from pytorch_quant.analysis.noise import Noise
from pytorch_quant.analysis.switches import Switch
from pytorch_quant.fake_quant import compute_scale, dynamic_quantize, quantize_to_codes
from pytorch_quant.formats import Format, IntFormat


class Observed:
    """The figures of one quantizer.

    Attributes:
        noise: Of the tensors that it saw.
        values: How many values it saw.
        clipped: How many of them lie outside of its range.
        used: For each code of the format, whether it occurred.
        channels: For each channel, whether any of its codes differs from 0; None where the number
            of channels varies.
    """

    def __init__(self) -> None:
        self.noise = Noise()
        self.values = 0
        self.clipped = 0
        self.used: Tensor | None = None
        self.channels: Tensor | None = None
        self._weights: set[int] = set()
        self._channels_vary = False

    def add(self, switch: Switch, x: Tensor, channel_axis: int | None) -> None:
        """Count one tensor; a parameter once, however often it comes."""
        if isinstance(x, nn.Parameter):
            if id(x) in self._weights:
                return
            self._weights.add(id(x))
        quantizer = switch.stand_in
        y = switch.quantized(x)
        # SmoothQuant divides the activation; its quantizer sees the quotient.
        if quantizer._pre_quant_scale is not None:
            x = x * quantizer._pre_quant_scale.to(x.dtype)
        self.noise.add(x, y)
        self.values += x.numel()
        x = x.detach()
        entered = quantizer.clip(x).detach() if quantizer._if_clip else x
        # The learned bounds of a clip need not lie symmetrically.
        outside = entered != x
        if not quantizer._if_quant:
            self.clipped += int(outside.sum())
            return
        codes, beyond, zero = _codes(quantizer, x, entered)
        self.clipped += int((outside | beyond).sum())
        index, size = _indices(codes, quantizer.format, quantizer._dynamic)
        if self.used is None:
            self.used = torch.zeros(size, dtype=torch.bool, device=x.device)
        self.used[index.reshape(-1)] = True
        if channel_axis is not None and x.dim() > 0:
            self._mark_channels(codes != zero, channel_axis % x.dim())

    def _mark_channels(self, alive: Tensor, axis: int) -> None:
        others = [a for a in range(alive.dim()) if a != axis]
        alive = alive.any(dim=others) if others else alive
        if self.channels is not None and self.channels.shape != alive.shape:
            self._channels_vary = True
        if self._channels_vary:
            self.channels = None
        else:
            self.channels = alive if self.channels is None else self.channels | alive


def check_real(switch: Switch, x: Tensor, batch: int) -> None:
    """Check that the values of a tensor have codes; infinity has one where the range is fixed.

    Raises:
        ValueError: they have none, naming the quantizer and the number of the batch.
    """
    dynamic = switch.stand_in._dynamic
    count = int((~x.isfinite() if dynamic else x.isnan()).sum())
    if count:
        what = "NaN or Inf" if dynamic else "NaN"
        raise ValueError(
            f"batch {batch}: {switch.holder.name}: {what} in {count} of {x.numel()} values that "
            "reach it in float; look for bad data, or for a layer that overflows float16"
        )


def _codes(quantizer: Any, x: Tensor, entered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes in the shape of `x`, which values lie outside of the range, the code of 0."""
    if quantizer._dynamic:
        codes, _, zero_point = dynamic_quantize(entered)
        return codes, torch.zeros_like(x, dtype=torch.bool), zero_point
    axis, block = quantizer._axis, quantizer._block_size
    rows = entered if block is None else axes.to_groups(entered, axis, block)
    amax = quantizer._effective_amax(rows, axis if block is None else 0)
    if block is not None and amax.dim():
        amax = amax.reshape(-1, 1)
    fmt = quantizer.format
    codes = quantize_to_codes(rows, compute_scale(amax, fmt, x.dtype), fmt)
    wide = x if block is None else axes.to_groups(x, axis, block)
    outside = wide.abs() > amax
    if not fmt.signed:
        outside |= wide < 0
    if block is not None:
        codes = axes.from_groups(codes, x.shape, axis)
        outside = axes.from_groups(outside, x.shape, axis)
    return codes, outside, codes.new_zeros(())


def _indices(codes: Tensor, fmt: Format, dynamic: bool) -> tuple[Tensor, int]:
    """The number of each code on its grid, and the size of the grid."""
    if dynamic:
        return codes.long(), 256
    if isinstance(fmt, IntFormat):
        return (codes - fmt.qmin).long(), int(fmt.qmax - fmt.qmin) + 1
    positive = torch.from_numpy(fmt.magnitudes()).to(codes.device, codes.dtype)
    grid = torch.cat([-positive[1:].flip(0), positive])
    return torch.searchsorted(grid, codes.contiguous()), len(grid)


def channel_axis(switch: Switch, kind: str, x: Tensor) -> int | None:
    """The axis of channels: the kept axis, of a weight that of outputs, of an activation by kind.

    Activations of convolutions, and others of four or five axes, have it in front of the spatial
    axes; the rest have it last.
    """
    kept = switch.stand_in._axis
    if isinstance(kept, int) and switch.stand_in._block_size is None:
        return kept
    if x.dim() == 0:
        return None
    words = kind.lower()
    if switch.is_weight or isinstance(x, nn.Parameter):
        return 1 if "transpose" in words and x.dim() > 1 else 0
    for spatial in (1, 2, 3):
        if words.endswith(f"{spatial}d"):
            return x.dim() - spatial - 1
    if x.dim() in (4, 5) and words != "linear":
        return 1
    return x.dim() - 1
