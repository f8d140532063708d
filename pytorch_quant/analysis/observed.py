"""What one quantizer does to the tensors that it sees, summed over a pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pytorch_quant.analysis.noise import Noise
from pytorch_quant.analysis.switches import Switch
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
        quantizer = switch.quantizer
        y = switch.quantized(x)
        entered = quantizer.entering(x.detach())
        # SmoothQuant divides the activation; its quantizer sees the quotient.
        self.noise.add(quantizer.prescaled(x), y)
        self.values += x.numel()
        x = quantizer.prescaled(x.detach())
        # The learned bounds of a clip need not lie symmetrically.
        outside = entered.x.detach() != x
        if not quantizer.quantizes:
            self.clipped += int(outside.sum())
            return
        if entered.amax is not None:
            rows = entered.as_rows(x)
            beyond = rows.abs() > entered.amax
            if not entered.format.signed:
                beyond |= rows < 0
            outside |= entered.in_shape(beyond)
        self.clipped += int(outside.sum())
        codes = entered.codes()
        index, size = _indices(codes, entered.format)
        if self.used is None:
            self.used = torch.zeros(size, dtype=torch.bool, device=x.device)
        self.used[index.reshape(-1)] = True
        if channel_axis is not None and x.dim() > 0:
            self._mark_channels(codes != entered.zero_point, channel_axis % x.dim())

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
    dynamic = switch.quantizer.dynamic
    count = int((~x.isfinite() if dynamic else x.isnan()).sum())
    if count:
        what = "NaN or Inf" if dynamic else "NaN"
        raise ValueError(
            f"batch {batch}: {switch.holder.name}: {what} in {count} of {x.numel()} values that "
            "reach it in float; look for bad data, or for a layer that overflows float16"
        )


def _indices(codes: Tensor, fmt: Format) -> tuple[Tensor, int]:
    """The number of each code on its grid, and the size of the grid."""
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
    kept = switch.quantizer.axis
    if isinstance(kept, int) and switch.quantizer.block_size is None:
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
