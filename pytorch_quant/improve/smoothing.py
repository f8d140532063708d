"""Smoothing one layer: the scales, a sample of its inputs, and trials on a copy."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pytorch_quant.calib import CalibrationError
from pytorch_quant.nn.modes import named_quantizers, preserved_modes
from pytorch_quant.ptq import calibrate
from pytorch_quant.ptq.sync import agreeing

# Far beyond what a working network needs, and harmless in float16.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 2.0**14
# The sample of a layer's inputs: pieces, positions in all of them together, and the side of a
# window of a convolution's input (more where the kernel reaches further).
_PIECES, _POSITIONS, _WINDOW = 512, 8192, 16


def smoothing_scale(input_maxima: Tensor, weight_maxima: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|**alpha / max|W_j|**(1 - alpha), float32 (Xiao et al. 2023, equation 4).

    A channel whose input or weight is all zero has s_j = 1; all are limited to 2**-14 ... 2**14.

    Args:
        input_maxima: `(C,)`, the largest magnitude of each input channel.
        weight_maxima: `(C,)`, the largest magnitude of the weight at each input channel.
        alpha: 0 to 1.
    """
    x, w = input_maxima.float(), weight_maxima.float()
    scale = x**alpha / w ** (1 - alpha)
    scale = scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    return torch.where((x > 0) & (w > 0), scale, 1.0)


class InputSample:
    """The maxima of a layer's input channels and a uniform sample of its inputs, raw."""

    def __init__(self, name: str, layer: Any) -> None:
        self._name = name
        self._spatial = layer.weight.dim() - 2
        kernel = getattr(layer, "kernel_size", ())
        reach = [
            (k - 1) * d + 1 for k, d in zip(kernel, getattr(layer, "dilation", ()), strict=True)
        ]
        self._window = [max(r, _WINDOW) for r in reach]
        self._generator = torch.Generator().manual_seed(0)
        self._keys = torch.empty(0)
        self.maxima: Tensor | None = None
        self.sample = torch.empty(0)

    def hook(self, quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Pre-hook of the input quantizer.

        Raises:
            CalibrationError: NaN or Inf in the input.
        """
        x = args[0].detach()
        if x.numel() == 0:
            return
        if self._spatial:
            x = x if x.dim() == self._spatial + 2 else x.unsqueeze(0)
        else:
            x = x.reshape(-1, x.shape[-1])
        maxima = x.abs().amax([d for d in range(x.dim()) if d != 1])
        if not bool(maxima.isfinite().all()):
            raise CalibrationError(f"{self._name}: NaN or Inf in its input; fix the data")
        self.maxima = maxima if self.maxima is None else torch.maximum(self.maxima, maxima)
        self._draw(self._windows(x))

    def _windows(self, x: Tensor) -> Tensor:
        """One window at a random place of each item of `x` `(N, C, ...)`."""
        for axis, size in enumerate(self._window, start=2):
            free = x.shape[axis] - size
            if free > 0:
                starts = torch.randint(free + 1, (len(x),), generator=self._generator)
                parts = [x[i : i + 1].narrow(axis, int(s), size) for i, s in enumerate(starts)]
                x = torch.cat(parts)
        return x

    def _draw(self, pieces: Tensor) -> None:
        # The pieces with the largest random keys of all are a uniform sample of what has passed.
        keys = torch.rand(len(pieces), generator=self._generator)
        if len(self._keys):
            if pieces.shape[1:] != self.sample.shape[1:]:
                return
            keys = torch.cat([self._keys, keys])
            pieces = torch.cat([self.sample, pieces])
        positions = math.prod(pieces.shape[2:])
        room = max(1, min(_PIECES, _POSITIONS // positions))
        self._keys, kept = keys.topk(min(room, len(keys)))
        self.sample = pieces[kept.to(pieces.device)]


class Trials:
    """Tries smoothing scales on a copy of a layer."""

    def __init__(
        self, name: str, layer: Any, inputs: InputSample, method: str, options: dict[str, Any]
    ) -> None:
        self._name, self._method, self._options = name, method, options
        self._weight = layer.weight.detach()
        self._weight_maxima = _weight_maxima(layer)
        self._sample = inputs.sample
        self._shape = channel_shape(layer)
        assert inputs.maxima is not None
        self._maxima = inputs.maxima.reshape(self._shape)
        self._present = _present_scale(layer)
        # A copy that shares what no trial changes, and does not run the hooks of the layer.
        twin: Any = copy.copy(layer)
        twin._parameters = dict(layer._parameters)
        twin._parameters["weight"] = nn.Parameter(self._weight.clone(), requires_grad=False)
        twin._modules = {key: copy.deepcopy(module) for key, module in layer._modules.items()}
        twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
        self._twin = twin

    def scale(self, alpha: float) -> Tensor:
        """The smoothing scale of the layer for this `alpha`, `(C,)`."""
        seen = (self._maxima.float() * self._present).abs().flatten()
        return smoothing_scale(seen, self._weight_maxima, alpha)

    @torch.no_grad()
    def search(
        self, alphas: Iterable[float], must_smooth: bool, together: bool = False
    ) -> tuple[float | None, float, float]:
        """Try every alpha on the sample, or on those of all processes.

        Args:
            alphas: What to try.
            must_smooth: No smoothing is not among the candidates.
            together: Sum the errors over all processes.

        Returns:
            The best alpha, or None for no smoothing, and the SQNR in dB without and with it.

        Raises:
            CalibrationError: the layer's values cannot be calibrated on, naming the layer.
            RuntimeError: an error of another process.
        """
        alphas = list(alphas)
        with agreeing(together) as stage:
            stage.value = self._powers(alphas)
        power, before, *noises = map(sum, zip(*stage.values, strict=True))
        least, best = min(zip(noises, alphas, strict=True))
        if least == math.inf or (before <= least and not must_smooth):
            return None, _decibel(power, before), _decibel(power, before)
        return best, _decibel(power, before), _decibel(power, least)

    def _powers(self, alphas: list[float]) -> list[float]:
        """Power of the output, of its error without smoothing, and with each alpha."""
        if not self._sample.numel():
            # No batch of this process has reached the layer.
            return [0.0] * (2 + len(alphas))
        twin = self._twin
        quantizers = named_quantizers(twin).values()
        with preserved_modes(twin):
            for quantizer in quantizers:
                quantizer.disable_quant()
                quantizer.disable_clip()
                quantizer.disable_calib()
            exact = twin(self._sample).double()
        for quantizer in quantizers:
            quantizer.enable_quant()
            quantizer.disable_calib()
        power = float(exact.square().sum())
        before = self._noise(exact, torch.ones_like(self.scale(0.5)))
        return [power, before, *(self._noise(exact, self.scale(alpha)) for alpha in alphas)]

    def _noise(self, exact: Tensor, scale: Tensor) -> float:
        """Power of the output error with this smoothing; infinite where a value overflows."""
        twin: Any = self._twin
        weight = (self._weight * _along_weight(twin, scale)).to(self._weight.dtype)
        if bool((weight.isinf() & self._weight.isfinite()).any()):
            return math.inf
        twin.weight.copy_(weight)
        twin._input_quantizer.pre_quant_scale = self._present / scale.reshape(self._shape)
        # Of the whole pass the maxima are known; any other method has to do with the sample.
        shown = self._maxima if self._method == "max" else self._sample
        try:
            calibrate(
                twin,
                [shown],
                self._method,
                forward=_show_input,
                progress=False,
                sync=False,
                **self._options,
            )
        except CalibrationError as error:
            raise CalibrationError(f"{self._name}: {error}") from error
        noise = float((twin(self._sample).double() - exact).square().sum())
        return noise if math.isfinite(noise) else math.inf


def _show_input(layer: Any, x: Tensor) -> Any:
    return layer._input_quantizer(x)


def apply_smoothing(layer: Any, scale: Tensor) -> None:
    """Multiply the weight by `scale` `(C,)` in place, and have the input divided by it."""
    with torch.no_grad():
        layer.weight.copy_(layer.weight * _along_weight(layer, scale))
    present = _present_scale(layer)
    layer._input_quantizer.pre_quant_scale = present / scale.reshape(channel_shape(layer))


def channel_shape(layer: Any) -> tuple[int, ...]:
    """`(C,)` for linear layers, `(C, 1, 1)` for 2-D convolutions: fits unbatched inputs too."""
    channels = layer.weight.shape[1] if isinstance(layer, nn.Linear) else layer.in_channels
    return (channels, *[1] * (layer.weight.dim() - 2))


def _present_scale(layer: Any) -> Tensor:
    """The `pre_quant_scale` of the input, float32, as `channel_shape` has it or `()`."""
    present = layer._input_quantizer.pre_quant_scale
    if present is None:
        return torch.ones((), device=layer.weight.device)
    return present.reshape(() if present.numel() == 1 else channel_shape(layer))


def _along_weight(layer: Any, scale: Tensor) -> Tensor:
    """`scale` `(C,)` so that it broadcasts against the weight, at its input channels."""
    kernel = [1] * (layer.weight.dim() - 2)
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, _ConvTransposeNd):
        return scale.reshape(-1, 1, *kernel)
    # Row k of the weight reads the C / groups input channels of its group.
    rows = scale.reshape(groups, -1).repeat_interleave(layer.weight.shape[0] // groups, 0)
    return rows.reshape(*rows.shape, *kernel)


def _weight_maxima(layer: Any) -> Tensor:
    """The largest magnitude of the weight at each input channel, `(C,)`."""
    weight = layer.weight.detach().abs()
    if isinstance(layer, _ConvTransposeNd):
        return weight.flatten(1).amax(1)
    groups = getattr(layer, "groups", 1)
    by_group = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    return by_group.amax((1, 3)).flatten()


def _decibel(power: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 and noise < math.inf else -math.inf
