"""Cross-layer equalization: moves scale between layers until a channel has one range in both.

Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019, section 4.1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pytorch_quant.dataflow import record
from pytorch_quant.improve.layer_pairs import LayerPair, find_pairs
from pytorch_quant.improve.layers import no_inference_mode
from pytorch_quant.improve.originals import original, remember, remembers
from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.plain_pass import plain_outputs, same_outputs
from pytorch_quant.tables import aligned

# A channel this small beside the largest is rounding noise, as batch norm leaves when it switches a
# channel off; to lift it would lift its bias by the same factor.
_DEAD = 2.0**-23


@dataclass(frozen=True)
class EqualizedPair:
    """Two layers between which scale was moved.

    Attributes:
        first: The qualified name of the layer whose output channels were divided.
        second: That of the layer whose input channels were multiplied.
        before: The largest over the smallest weight range of a channel, output channels of `first`
            or input channels of `second`, whichever ratio is larger; dead channels left out. A
            weight quantized per tensor loses this factor in its finest channel.
        after: The same afterwards. Not 1 in general: what is made equal is the range of a channel
            in both layers.
    """

    first: str
    second: str
    before: float
    after: float


@dataclass(frozen=True)
class EqualizationReport:
    """What `equalize_weights` did; `print` it for a table.

    Attributes:
        pairs: The pairs in the order in which the model runs them.
        skipped: Layers with the reason why they are the first of no pair.
        uncalibrated: Names of the quantizers whose amax was cleared, as the range of their tensor
            has changed. They need a new calibration.
        iterations: Rounds over all pairs that were made.
        converged: Whether the last round moved no channel by more than the tolerance.
    """

    pairs: list[EqualizedPair]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)
    iterations: int = 0
    converged: bool = True

    def __str__(self) -> str:
        rows = [("first", "second", "range ratio")]
        rows += [(p.first, p.second, f"{p.before:.4g} -> {p.after:.4g}") for p in self.pairs]
        rows += [(name, "not paired", reason) for name, reason in self.skipped]
        rows += [(name, "not calibrated", "calibrate again") for name in self.uncalibrated]
        return "\n".join(aligned(rows))


@no_inference_mode()
def equalize_weights(
    model: nn.Module, example_inputs: Any, *, iterations: int = 20, tolerance: float = 0.01
) -> EqualizationReport:
    """Give each channel one weight range in the layer before and the layer after it, in place.

    Where one layer follows another through nothing but functions with `f(c x) = c f(x)` for every
    `c > 0` (ReLU, leaky ReLU, pooling, dropout, flatten), channel i of the first is divided, and
    input i of the second multiplied by (equation 9 of the paper; ranges are largest magnitudes)

        s_i = sqrt(r1_i * r2_i) / r2_i

    which makes both ranges `sqrt(r1_i * r2_i)`; all pairs take turns until nothing moves. The float
    function of the model stays the same, up to rounding. What gains is per-tensor quantization, of
    weights above all. Best before calibration, and after batch norm is folded.

    Activations between the layers are divided by s as well. In a calibrated model, the amax of each
    quantizer that sees one of them is cleared together with its statistics, and the report names
    it: calibrate again. The amax of a changed weight is taken anew as its largest magnitude, if it
    had one. Layers of a pair whose quantizers have a fixed or a learned range are left alone.

    Pairs are found in one forward pass. Another input may take another path: where the model has
    control flow, give an input that takes the path that matters.

    Args:
        model: With quantized or float convolutions and linear layers, on any device.
        example_inputs: A tensor, a mapping of keywords, or a tuple or list of arguments.
        iterations: The most rounds over all pairs.
        tolerance: Stop when a round changes every scale by less than this, relative.

    Returns:
        The pairs with their ranges before and after, and why other layers have none.

    Raises:
        RuntimeError: the new weights do not give the outputs of the old ones on `example_inputs`:
            the model computes something from a tensor between two layers without torch, or is
            random in a way that torch's seed does not rule. Nothing is changed then.
        TypeError: `example_inputs` is of another type.
        ValueError: no convolution or linear layer; a weight or bias with NaN or Inf, naming the
            layer; a new weight or bias beyond the range of its dtype; `iterations` or `tolerance`
            out of range.
        Exception: whatever the model raises.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r} is out of range; use an int >= 1")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} is out of range; use a number from 0 to 1")
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    }
    if not layers:
        raise ValueError(
            f"the model ({type(model).__name__}) has no convolution or linear layer to equalize"
        )
    for name, layer in layers.items():
        for tensor in (layer.weight, layer.bias):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{name}: NaN or Inf in its weights; load a checkpoint without them"
                )
    flow = record(model, copy.deepcopy(example_inputs))
    pairs, skipped = find_pairs(model, layers, flow)
    if not pairs:
        return EqualizationReport([], skipped)

    solver = _Solver(layers, pairs)
    before = [solver.ratio(pair) for pair in pairs]
    rounds, converged = solver.run(iterations, tolerance)
    changed = {
        tensor: new
        for name in dict.fromkeys(n for pair in pairs for n in (pair.first, pair.second))
        for tensor, new in solver.scaled(name)
    }
    ranges = _new_ranges(model, changed)
    biases = {
        name: original(layers[name], "bias")
        for name in solver.out_scale
        if remembers(layers[name], "bias")
    }
    _replace(model, example_inputs, changed)
    for name, bias in biases.items():
        if bias is not None:
            scale = solver.out_scale[name].flatten().cpu()
            bias = (bias.double() * scale).to(bias.dtype)
        remember(layers[name], "bias", bias)
    for quantizer, amax in ranges.items():
        quantizer.set_range(amax)
        if quantizer.calibrator is not None:
            quantizer.calibrator.reset()
    cleared = _clear(model, [name for pair in pairs for name in pair.quantizers])
    rows = [
        EqualizedPair(pair.first, pair.second, ratio, solver.ratio(pair))
        for pair, ratio in zip(pairs, before, strict=True)
    ]
    return EqualizationReport(rows, skipped, cleared, rounds, converged)


# Solving for the scales


class _Solver:
    """Largest magnitudes of each weight, `(groups, outputs, inputs)`, and the scales so far."""

    def __init__(self, layers: dict[str, Any], pairs: list[LayerPair]) -> None:
        self.layers, self.pairs = layers, pairs
        self.magnitudes: dict[str, Tensor] = {}
        self.out_scale: dict[str, Tensor] = {}
        self.in_scale: dict[str, Tensor] = {}
        for name in {n for pair in pairs for n in (pair.first, pair.second)}:
            weight = layers[name].weight.detach().double().abs()
            grid = _grouped(layers[name], weight).unsqueeze(-1).flatten(3).amax(3)
            self.magnitudes[name] = grid
            self.out_scale[name] = torch.ones_like(grid[:, :, 0])
            self.in_scale[name] = torch.ones_like(grid[:, 0, :])

    def ranges(self, pair: LayerPair) -> tuple[Tensor, Tensor]:
        """r1 and r2 of each channel between two layers; 0 in both where one of them is dead."""
        r1 = self.magnitudes[pair.first].amax(2).flatten()
        r2 = self.magnitudes[pair.second].amax(1).reshape(-1, pair.repeat).amax(1)
        alive = (r1 > _DEAD * r1.max()) & (r2 > _DEAD * r2.max())
        return r1 * alive, r2 * alive

    def ratio(self, pair: LayerPair) -> float:
        """How far the ranges of the channels lie apart; 1 if none is alive."""
        ratios = [1.0]
        for ranges in self.ranges(pair):
            alive = ranges[ranges > 0]
            ratios += [float(alive.max() / alive.min())] if alive.numel() else []
        return max(ratios)

    def run(self, iterations: int, tolerance: float) -> tuple[int, bool]:
        """Take turns over the pairs; the number of rounds, and whether they have converged."""
        for done in range(1, iterations + 1):
            moved = max(self._equalize(pair) for pair in self.pairs)
            if moved < tolerance:
                return done, True
        return iterations, False

    def _equalize(self, pair: LayerPair) -> float:
        r1, r2 = self.ranges(pair)
        scale = torch.where(r1 > 0, torch.sqrt(r1 * r2) / r2, 1.0)
        rows = scale.reshape(self.out_scale[pair.first].shape)
        columns = scale.repeat_interleave(pair.repeat).reshape(self.in_scale[pair.second].shape)
        self.magnitudes[pair.first] /= rows[:, :, None]
        self.magnitudes[pair.second] *= columns[:, None, :]
        self.out_scale[pair.first] /= rows
        self.in_scale[pair.second] *= columns
        return float((scale - 1).abs().max())

    def scaled(self, name: str) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters of a layer with their new values."""
        layer = self.layers[name]
        weight = layer.weight.detach().double()
        factors = self.out_scale[name][:, :, None] * self.in_scale[name][:, None, :]
        grid = _grouped(layer, weight)
        grid = grid * factors.reshape(*factors.shape, *[1] * (grid.dim() - 3))
        scaled = [(layer.weight, _ungrouped(layer, grid).to(layer.weight.dtype))]
        if layer.bias is not None:
            bias = layer.bias.detach().double() * self.out_scale[name].flatten()
            scaled.append((layer.bias, bias.to(layer.bias.dtype)))
        if not all(bool(torch.isfinite(new).all()) for _, new in scaled):
            raise ValueError(
                f"{name}: the equalized weight or bias exceeds the range of {layer.weight.dtype}; "
                "equalize the model in float32"
            )
        return scaled


def _grouped(layer: Any, weight: Tensor) -> Tensor:
    """`weight` as `(groups, outputs of a group, inputs of a group, ...)`."""
    groups = getattr(layer, "groups", 1)
    grid = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return grid.transpose(1, 2) if isinstance(layer, _ConvTransposeNd) else grid


def _ungrouped(layer: Any, grid: Tensor) -> Tensor:
    grid = grid.transpose(1, 2) if isinstance(layer, _ConvTransposeNd) else grid
    return grid.reshape(layer.weight.shape)


# Changing the model


def _new_ranges(
    model: nn.Module, changed: dict[nn.Parameter, Tensor]
) -> dict[TensorQuantizer, Tensor]:
    """The amax of the calibrated quantizers of weights that change."""
    ranges = {}
    for quantizer, weights in weight_quantizers(model).items():
        if quantizer.amax is None or not any(w is tensor for w in weights for tensor in changed):
            continue
        calibrator = quantizer.fresh_calibrator("max")
        for weight in weights:
            quantizer.collect(changed.get(weight, weight), calibrator)
        amax = calibrator.compute_amax()
        if amax is not None:
            ranges[quantizer] = amax
    return ranges


@torch.no_grad()
def _replace(model: nn.Module, example_inputs: Any, changed: dict[nn.Parameter, Tensor]) -> None:
    """Write the new weights, unless they change what the model computes."""
    old = {tensor: tensor.detach().clone() for tensor in changed}
    expected = plain_outputs(model, example_inputs)
    try:
        for tensor, new in changed.items():
            tensor.copy_(new)
        if not same_outputs(expected, plain_outputs(model, example_inputs)):
            raise RuntimeError(
                "equalized weights change the outputs of the model: it takes a tensor between two "
                "layers where no torch function shows it (NumPy, a custom autograd function), or "
                "is random beyond torch's seed. The weights are as they were"
            )
    except BaseException:
        for tensor, before in old.items():
            tensor.copy_(before)
        raise


def _clear(model: nn.Module, names: list[str]) -> list[str]:
    """Make quantizers uncalibrated; the names of those that were calibrated."""
    quantizers = named_quantizers(model)
    cleared = []
    for name in dict.fromkeys(names):
        quantizer = quantizers[name]
        if quantizer.amax is not None:
            quantizer.amax = None
            cleared.append(name)
        if quantizer.calibrator is not None:
            quantizer.calibrator.reset()
    return cleared
