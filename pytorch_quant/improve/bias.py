"""Bias correction: take the mean error that quantization causes out of the biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant import distributed
from pytorch_quant.batches import Forward
from pytorch_quant.improve.layers import (
    check_alike,
    check_calibrated,
    no_inference_mode,
    repeatable,
    run_batches,
    several_processes,
    weighted_layers,
)
from pytorch_quant.improve.originals import original, original_parameters, remember
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.ptq.sync import agreeing


@dataclass(frozen=True)
class CorrectedLayer:
    """What bias correction did to one layer.

    Attributes:
        name: Its qualified name.
        mean_shift: Mean over output channels of `|E[y_quantized] - E[y_float]|`, real units.
        largest_shift: The largest of them.
        bias_added: The layer had no bias and has one now.
    """

    name: str
    mean_shift: float
    largest_shift: float
    bias_added: bool


@dataclass(frozen=True)
class BiasCorrectionReport:
    """What bias correction did; `print` it for a table.

    Attributes:
        layers: One row for each corrected layer, in the order of the model.
        skipped: Why the other layers were left as they were, by name.
    """

    layers: list[CorrectedLayer]
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(len(name) for name in ["layer", *(r.name for r in self.layers), *self.skipped])
        lines = [f"{'layer':{width}}  mean shift  largest shift"]
        lines += [
            f"{row.name:{width}}  {row.mean_shift:10.4g}  {row.largest_shift:13.4g}"
            + "  bias added" * row.bias_added
            for row in self.layers
        ]
        lines += [f"{name:{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@no_inference_mode()
def bias_correction(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: bool = True,
    sync: bool = True,
) -> BiasCorrectionReport:
    """Correct the biases of a calibrated `model`, in place, for the mean error of quantization.

    Subtracts E[y_quantized] - E[y_float] of each output channel from the bias, where y is the
    output of a quantized convolution or linear layer (Nagel, van Baalen, Blankevoort, Welling,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section
    4.2; the empirical form of appendix D). One pass with the quantizers idle measures the float
    means. In a second, quantized pass each layer's output is corrected by what has been seen of
    it so far, so that the layers behind it are measured on corrected inputs: with one batch that
    is the correction of layer after layer; the estimates of several batches converge to it, and
    large batches serve better than many.

    The float means are those of the original model: with the biases before an earlier correction
    and the weights before `adaround`. Called again, it changes what is left of the error, or what a
    new calibration has brought. What it takes for that is kept beside the layers, also in copies
    and pickles, but not in a state_dict: a model that was loaded from one is its own original, and
    so is a parameter that was trained or loaded since. Correct such a model once.

    In a torch.distributed process group every process calls this with its share of the batches, and
    all get the same biases, from the means over all batches. An error of one process is raised in
    the others, too.

    A layer without a bias gets one: a parameter in the dtype and on the device of the weight,
    trained if the weight is. The key `bias` is then in the state_dict of the layer, and a model
    that loads it has to be built with `bias=True`, or corrected the same way first. Layers whose
    quantizers both rest are left, and so are biases that are no parameter of one layer alone.

    Args:
        model: Calibrated; quantizers act as their modes say.
        batches: As in `calibrate`. Both passes must see the same inputs, in any order.
        forward: `forward(model, batch)` runs one batch instead of the rule of `calibrate`.
        progress: Show progress bars.
        sync: Correct together with all processes of the group; if false, each one by itself.

    Returns:
        The shift of each layer. Print it for a table.

    Raises:
        RuntimeError: uncalibrated quantizers, naming them; a mean that is NaN or infinite, naming
            the layer; an error of another process. The model is as it was.
        TypeError: `batches` is a tensor or no iterable, or an iterator, which only lasts for one
            pass.
        ValueError: no quantized layers, no batches, processes whose layers differ, or weights that
            are sharded over processes.
    """
    together = several_processes(model, sync, "bias_correction")
    with agreeing(together):
        layers = weighted_layers(model)
        repeatable(batches, "bias_correction")
        check_calibrated(model, "bias_correction")
        skipped = _unfit(model, layers)
    if together:
        check_alike({name: layer for name, layer in layers.items() if name not in skipped})
    means = {name: _Means(layer) for name, layer in layers.items() if name not in skipped}

    def run(quantized: bool) -> None:
        kind = "quantized" if quantized else "float"
        description = f"bias_correction ({kind})"
        handles = []
        try:
            for name, mean in means.items():
                hook = mean.correct if quantized else mean.observe
                # Before hooks of the user's, which may change the output.
                handles.append(layers[name].register_forward_hook(hook, prepend=True))
            run_batches(
                model,
                batches,
                description,
                quantized=quantized,
                forward=forward,
                progress=progress,
                together=together,
            )
        finally:
            for handle in handles:
                handle.remove()

    with original_parameters(model):
        run(quantized=False)
    run(quantized=True)
    totals = {name: mean.totals() for name, mean in means.items()}
    if together:
        distributed.all_reduce(list(totals.values()), "sum")
    shifts = {}
    for name, total in totals.items():
        if not bool(total[:, -1].all()):
            skipped[name] = "no batch reached it"
            continue
        real, quantized = total[:, :-1] / total[:, -1:]
        shift = quantized - real
        if not bool(shift.isfinite().all()):
            raise RuntimeError(
                f"{name}: the mean of its output is NaN or infinite; find the batch that overflows"
            )
        shifts[name] = shift
    added = {name for name in shifts if layers[name].bias is None}
    _subtract({layers[name]: shift for name, shift in shifts.items()})
    rows = [
        CorrectedLayer(n, float(s.abs().mean()), float(s.abs().max()), n in added)
        for n, s in shifts.items()
    ]
    return BiasCorrectionReport(rows, {name: skipped[name] for name in layers if name in skipped})


class _Means:
    """Running means of one layer's output per output channel, float64."""

    def __init__(self, layer: Any) -> None:
        # The channel axis counted from the end: batched and unbatched outputs have the same.
        self._axis = 1 - layer.weight.dim() if layer.weight.dim() > 2 else -1
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        self._zeros = torch.zeros(channels, dtype=torch.float64, device=layer.weight.device)
        self._float_sum = self._zeros
        self._quantized_sum = self._zeros
        self.float_count = 0
        self.quantized_count = 0

    def observe(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the float pass."""
        total, count = self._sum(output)
        self._float_sum = self._float_sum + total
        self.float_count += count

    def correct(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Forward hook of the quantized pass: the output without the shift seen so far."""
        total, count = self._sum(output)
        self._quantized_sum = self._quantized_sum + total
        self.quantized_count += count
        if not (self.float_count and self.quantized_count):
            return output
        shape = [1] * output.dim()
        shape[self._axis] = -1
        # Of this process alone, whose float pass has seen the same inputs.
        real = self._float_sum / self.float_count
        shift = self._quantized_sum / self.quantized_count - real
        return (output - shift.reshape(shape)).to(output.dtype)

    def totals(self) -> Tensor:
        """`(2, K + 1)`: sums over the float and the quantized pass, with the count behind them."""
        sums = torch.stack([self._float_sum, self._quantized_sum])
        counts = sums.new_tensor([[self.float_count], [self.quantized_count]])
        return torch.cat([sums, counts], 1)

    def _sum(self, output: Tensor) -> tuple[Tensor, int]:
        others = [d for d in range(output.dim()) if d != output.dim() + self._axis]
        channels = output.shape[self._axis]
        # Summing over no axes at all would sum over every one.
        total = output.double().sum(others) if others else output.double()
        return total, output.numel() // channels


def _unfit(model: nn.Module, layers: dict[str, Any]) -> dict[str, str]:
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    reasons = {}
    for name, layer in layers.items():
        if not any(
            _acts(getattr(layer, q, None)) for q in ("_input_quantizer", "_weight_quantizer")
        ):
            reasons[name] = "neither its input nor its weight is quantized"
        elif "bias" not in layer._parameters:
            reasons[name] = "its bias is computed, not a parameter"
        elif layer.bias is not None and owners[id(layer.bias)] > 1:
            reasons[name] = "its bias is shared with another layer"
    return reasons


def _acts(quantizer: Any) -> bool:
    return isinstance(quantizer, TensorQuantizer) and quantizer.quantizes


def _subtract(shifts: dict[Any, Tensor]) -> None:
    before: dict[Any, Tensor | None] = {
        layer: None if layer.bias is None else layer.bias.detach().clone() for layer in shifts
    }
    originals = {layer: original(layer, "bias") for layer in shifts}
    try:
        with torch.no_grad():
            for layer, shift in shifts.items():
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias.double() - shift)
                else:
                    bias = (-shift).to(layer.weight.device, layer.weight.dtype)
                    layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        for layer, value in originals.items():
            remember(layer, "bias", value)
    except BaseException:
        with torch.no_grad():
            for layer, kept in before.items():
                if kept is None:
                    layer.bias = None
                else:
                    layer.bias.copy_(kept)
        raise
