"""The mathematics of adaptive rounding: one layer, its weight's grid, and what is learned on it.

Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
Quantization", ICML 2020; the equations are numbered as there. `w` is the weight, `scale` its step,
`v` what is learned, one value for each weight, and `h(v)` the share of a step that is added to
`floor(w / scale)`: at the end 0 (down) or 1 (up).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.tables import aligned

# The stretch of the rectified sigmoid, so that it reaches 0 and 1 with a gradient (eq. 23).
ZETA, GAMMA = 1.1, -0.1

# Arguments of a layer's forward besides the input, such as the output size.
Rest = tuple[tuple[Any, ...], dict[str, Any]]
# The output of the layer from a weight, an input and the other arguments.
Output = Callable[[Tensor, Tensor, Rest], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how hard a layer is learned; the arguments of `adaround`."""

    iterations: int
    batch_size: int
    learning_rate: float
    warm_up: float
    beta: tuple[float, float]
    regularization: float

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size"):
            check_count(name, getattr(self, name))
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate!r}")
        if not self.regularization >= 0:
            raise ValueError(f"regularization must be 0 or more, got {self.regularization!r}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up is a share from 0 to below 1, got {self.warm_up!r}")
        if len(self.beta) != 2 or not self.beta[0] >= self.beta[1] >= 1:
            # Below 1 the gradient of |2h - 1| ** beta is infinite at h = 0.5.
            raise ValueError(f"beta is (first, last), first >= last >= 1, got {self.beta!r}")


def check_count(name: str, value: int) -> None:
    """Raise unless `value` is a positive integer.

    Raises:
        ValueError: naming `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def rectified_sigmoid(v: Tensor) -> Tensor:
    """`h(v) = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)`, eq. 23."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The `v` whose `h(v)` is `h`, 0 to 1."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1.0)


def rounding_regularizer(h: Tensor, beta: float) -> Tensor:
    """`sum(1 - |2h - 1| ** beta)`, eq. 24: 0 where every `h` is 0 or 1."""
    return (1.0 - (2.0 * h - 1.0).abs().pow(beta)).sum()


def annealed_beta(done: float, beta: tuple[float, float]) -> float:
    """The exponent of the regularizer, falling along half a cosine.

    Args:
        done: The share of the regularized iterations that is done, 0 to 1.
        beta: The first and the last value.
    """
    first, last = beta
    return last + 0.5 * (first - last) * (1.0 + math.cos(done * math.pi))


@dataclass(frozen=True)
class LayerRounding:
    """What adaptive rounding did to one layer.

    Attributes:
        name: Its qualified name.
        nearest: Signal to quantization noise of its output with the weights rounded to nearest,
            dB, on the samples.
        learned: The same with the learned rounding.
        changed: Weights whose code is not the nearest; 0 where nearest was kept.
        weights: Weights in all.
        kept_nearest: The learned rounding was no better, and the weight was left as it was.
    """

    name: str
    nearest: float
    learned: float
    changed: int
    weights: int
    kept_nearest: bool


@dataclass(frozen=True)
class RoundingReport:
    """What `adaround` did; `print` it for a table.

    Attributes:
        layers: One row for each layer that was learned, in the order in which they run.
        skipped: Why a layer was left as it was, by qualified name.
    """

    layers: list[LayerRounding]
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layer", "nearest, dB", "learned, dB", "other way")]
        for row in self.layers:
            share = f"{row.changed} of {row.weights} ({row.changed / row.weights:.1%})"
            kept = "nearest kept" if row.kept_nearest else share
            rows.append((row.name, f"{row.nearest:.2f}", f"{row.learned:.2f}", kept))
        lines = aligned(rows)
        lines += [f"{name}: skipped, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


class WeightGrid:
    """The codes that a weight may take.

    Args:
        weight: Any shape; half precision is computed in float32.
        quantizer: Its quantizer: calibrated, with an integer format.

    Attributes:
        scale: Real units per step, broadcasts against the weight.
        nearest: The codes that the quantizer rounds to, as float values.
        lower: `floor(w / scale)`.
        part: `w / scale - floor(w / scale)`, 0 to 1.
    """

    def __init__(self, weight: Tensor, quantizer: TensorQuantizer) -> None:
        entered = quantizer.entering(weight)
        scale = entered.scale
        blocks = quantizer.block_size is not None
        self.scale = entered.in_shape(scale.expand(entered.rows.shape)) if blocks else scale
        self.low, self.high = entered.format.qmin, entered.format.qmax
        self.nearest = entered.codes()
        steps = weight.to(self.nearest.dtype) / torch.where(self.scale > 0, self.scale, 1.0)
        self.lower = steps.floor()
        self.part = steps - self.lower

    def soft(self, h: Tensor) -> Tensor:
        """`scale * clip(floor(w / scale) + h, low, high)`, eq. 22."""
        return self.values((self.lower + h).clamp(self.low, self.high))

    def codes(self, h: Tensor) -> Tensor:
        """The codes when every `h` is rounded to 0 or 1; 0 where the scale is 0."""
        codes = (self.lower + (h >= 0.5)).clamp(self.low, self.high)
        return torch.where(self.scale > 0, codes, 0.0)

    def values(self, codes: Tensor) -> Tensor:
        """Real values from codes."""
        return codes * self.scale


@dataclass(frozen=True)
class Sample:
    """Inputs of a layer and the outputs that it should have.

    Attributes:
        inputs: Quantized, from the model with the layers before already rounded, `(N, ...)`.
        targets: Outputs of the layer in the float model, `(N, ...)`.
        rest: The other arguments of the layer's forward.
    """

    inputs: Tensor
    targets: Tensor
    rest: Rest


@torch.no_grad()
def squared_error(output: Output, weight: Tensor, samples: list[Sample], step: int) -> float:
    """`||f(w x) - f(w~ x^)||**2`, summed over the samples.

    Args:
        output: The layer.
        weight: The quantized weight `w~`.
        samples: What to compare on.
        step: Rows to compute at once.
    """
    total = 0.0
    for sample in samples:
        for x, y in zip(sample.inputs.split(step), sample.targets.split(step), strict=True):
            total += float((output(weight, x, sample.rest) - y).double().square().sum())
    return total


def learn_codes(
    output: Output,
    grid: WeightGrid,
    samples: list[Sample],
    schedule: Schedule,
    unit: float,
    generator: torch.Generator,
    tick: Callable[[], Any],
) -> Tensor:
    """Learn which way to round each weight of one layer, eq. 21 and 25.

    The paper adds `lambda` times the sum of the regularizer to the error itself, so that the right
    lambda depends on the units of the output and on the size of the weight. Here the error is
    divided by that of nearest rounding, and the regularizer is a mean.

    Args:
        output: The layer.
        grid: The codes of its weight.
        samples: At least one row in all.
        schedule: How long and how hard.
        unit: The error of nearest rounding: summed over the channels of an output, which are
            axis 1, and averaged over everything else.
        generator: On the CPU; draws the batches.
        tick: Called after every iteration.

    Returns:
        The codes, as float values in the shape of the weight.
    """
    v = inverse_rectified_sigmoid(grid.part).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=schedule.learning_rate)
    sizes = torch.tensor([float(len(sample.inputs)) for sample in samples])
    warm_up = schedule.warm_up * schedule.iterations
    for iteration in range(schedule.iterations):
        # Shapes may differ from sample to sample; a batch comes from one of them.
        which = 0
        if len(samples) > 1:
            which = int(torch.multinomial(sizes, 1, generator=generator))
        sample = samples[which]
        rows = torch.randint(
            len(sample.inputs),
            (min(schedule.batch_size, len(sample.inputs)),),
            generator=generator,
        ).to(sample.inputs.device)
        h = rectified_sigmoid(v)
        error = output(grid.soft(h), sample.inputs[rows], sample.rest) - sample.targets[rows]
        loss = error.square().sum(1).mean() / unit
        if iteration >= warm_up:
            done = (iteration - warm_up) / (schedule.iterations - warm_up)
            beta = annealed_beta(done, schedule.beta)
            undecided = rounding_regularizer(h, beta) / h.numel()
            loss = loss + schedule.regularization * undecided
        (v.grad,) = torch.autograd.grad(loss, v)
        optimizer.step()
        tick()
    return grid.codes(rectified_sigmoid(v.detach()))


def learn_layer(
    name: str,
    layer: Any,
    samples: list[Sample],
    schedule: Schedule,
    generator: torch.Generator,
    tick: Callable[[], Any],
) -> tuple[LayerRounding, Tensor | None]:
    """Learn the rounding of one layer, which stays as it is.

    Args:
        name: Of the layer, for the report.
        layer: Quantized; its weight quantizer is calibrated.
        samples: At least one row in all.
        schedule: How long and how hard.
        generator: On the CPU; draws the batches.
        tick: Called after every iteration.

    Returns:
        The row of the report, and the new weight; None where nearest rounding is as good.
    """
    output, weight = detached(layer), layer.weight.detach()
    with torch.autocast(weight.device.type, enabled=False):
        grid = WeightGrid(weight, layer._weight_quantizer)
        nearest = squared_error(output, grid.values(grid.nearest), samples, schedule.batch_size)
        positions = sum(sample.targets[:, 0].numel() for sample in samples)
        unit = nearest / positions if nearest else 1.0
        with torch.enable_grad():
            codes = learn_codes(output, grid, samples, schedule, unit, generator, tick)
        learned = squared_error(output, grid.values(codes), samples, schedule.batch_size)
    power = sum(float(sample.targets.double().square().sum()) for sample in samples)
    # Written so that NaN keeps nearest.
    better = learned < nearest
    changed = int((codes != grid.nearest).sum()) if better else 0
    row = LayerRounding(
        name, _db(power, nearest), _db(power, learned), changed, weight.numel(), not better
    )
    return row, grid.values(codes).to(weight.dtype) if better else None


def _db(power: float, noise: float) -> float:
    if not noise:
        return math.inf
    ratio = power / noise
    return 10.0 * math.log10(ratio) if ratio else -math.inf


def detached(layer: Any) -> Output:
    """The forward of `layer` from a given weight and an input that is quantized already.

    A shallow copy runs it, without hooks and quantizers, so that the layer stays untouched.
    """
    twin = copy.copy(layer)
    wide = wide_dtype(layer.weight)
    held = vars(twin)
    # What an instance holds itself comes before its parameters and modules.
    held["_input_quantizer"] = held["_weight_quantizer"] = lambda x: x
    held["bias"] = None if layer.bias is None else layer.bias.detach().to(wide)

    def output(weight: Tensor, x: Tensor, rest: Rest) -> Tensor:
        held["weight"] = weight
        return type(layer).forward(twin, x, *rest[0], **rest[1])

    return output


def wide_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that the layer of `weight` is computed in: at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)
