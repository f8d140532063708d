"""SmoothQuant: hand the outliers of an activation over to the weight, channel by channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pytorch_quant import distributed
from pytorch_quant.batches import Forward
from pytorch_quant.improve.layers import (
    check_alike,
    chosen_layers,
    no_inference_mode,
    repeatable,
    run_batches,
    several_processes,
    weighted_layers,
)
from pytorch_quant.improve.smoothing import (
    InputSample,
    Trials,
    apply_smoothing,
    channel_shape,
)
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.ptq import calibrate
from pytorch_quant.ptq.sync import agreeing

_ALPHAS = tuple(i / 20 for i in range(21))


@dataclass(frozen=True)
class SmoothedLayer:
    """What smoothing did to one layer.

    Attributes:
        name: Its qualified name.
        alpha: The exponent that was applied; None where no smoothing was best.
        sqnr_before: Power of the float output over that of its quantization error, in dB, on the
            sample, calibrated without smoothing.
        sqnr_after: The same with it.
    """

    name: str
    alpha: float | None
    sqnr_before: float
    sqnr_after: float


@dataclass(frozen=True)
class SmoothingReport:
    """What `smooth_quant` did; `print` it for a table.

    Attributes:
        layers: One row for each layer that was tried, in the order of the model.
        skipped: Why the other layers were left as they were, by name.
    """

    layers: list[SmoothedLayer]
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(len(name) for name in ["layer", *(r.name for r in self.layers), *self.skipped])
        lines = [f"{'layer':{width}}  alpha  SQNR before  SQNR after"]
        lines += [
            f"{row.name:{width}}  {'none' if row.alpha is None else f'{row.alpha:.2f}':>5}"
            f"  {row.sqnr_before:8.2f} dB  {row.sqnr_after:7.2f} dB"
            for row in self.layers
        ]
        lines += [f"{name:{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@no_inference_mode()
def smooth_quant(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    alpha: float | None = None,
    method: str = "max",
    forward: Forward | None = None,
    progress: bool = True,
    layers: str | Iterable[str] | None = None,
    sync: bool = True,
    **options: Any,
) -> SmoothingReport:
    """Smooth and calibrate `model`, in place: outliers move from activations into weights.

    Input channel j of a layer is divided by s_j and that channel of its weight multiplied by it,
    s_j = max|X_j|**alpha / max|W_j|**(1 - alpha) (Xiao, Lin, Seznec, Wu, Demouth, Han,
    "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    ICML 2023, equation 4). The division is the `pre_quant_scale` of the input quantizer, which
    acts whatever the modes are: with idle quantizers the model computes the same function up to
    rounding. A `pre_quant_scale` that is there already is kept as a factor.

    One pass collects the maxima of each input channel and a random sample of each layer's input:
    512 rows of a linear layer; of a convolution random windows, 16 wide or as wide as its kernel
    reaches, with 8,192 positions in all (windows of another shape than the first are left out).
    On the sample the alpha of a layer is the one of 0, 0.05 ... 1 with the least mean squared
    error of the layer's output, and a layer for which none beats no smoothing stays as it is. A
    second pass calibrates the whole model.

    Layers are skipped where the input is not quantized per tensor, the range of the input or of the
    weight is fixed (as `adaround` leaves it: smooth before) or learned, or the input quantizer or
    the weight is shared; the report says why.

    In a torch.distributed process group every process calls this with its share of the batches, and
    all get the same weights: maxima are those of all batches, and errors are summed over the
    samples of all processes. An error of one process is raised in the others, too.

    Args:
        model: Holds quantized convolutions or linear layers.
        batches: As in `calibrate`; run through twice.
        alpha: How much of the range goes into the weight, 0 to 1, for every layer and without a
            search; None searches it for each layer.
        method: How activations are ranged, as in `calibrate`.
        forward: `forward(model, batch)` runs one batch instead of the rule of `calibrate`.
        progress: Show progress bars.
        layers: Names or glob patterns (`*` crosses dots) of the layers to smooth; all by default.
        sync: Smooth and calibrate together with all processes of the group; if false, each one by
            itself.
        **options: Options of `calibrate`: of the method, or `weight_method`.

    Returns:
        Alpha and SQNR of each layer, and what was skipped. Print it for a table.

    Raises:
        CalibrationError: NaN or Inf, or a negative value at an unsigned quantizer.
        RuntimeError: a batch on another device than the model, or an error of another process.
        TypeError: `batches` is a tensor or no iterable, or an iterator, which only lasts for one
            pass; unknown options.
        ValueError: no quantized layers, no batches, an alpha outside 0 to 1, an unknown name in
            `layers`, an unknown method, processes whose layers or arguments differ, or weights
            that are sharded over processes. After any error the model is as it was.
    """
    together = several_processes(model, sync, "smooth_quant")
    with agreeing(together):
        found = chosen_layers(weighted_layers(model), layers)
        repeatable(batches, "smooth_quant")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie from 0 to 1, got {alpha}; None searches it")
        if "accumulate" in options:
            raise TypeError("smooth_quant has no option 'accumulate': inputs change by smoothing")
        skipped = _unfit(model, found)
    if together:
        wanted = {name: layer for name, layer in found.items() if name not in skipped}
        check_alike(wanted, alpha=alpha, method=method, **options)
    progress = progress and not (together and distributed.rank())
    inputs = {n: InputSample(n, layer) for n, layer in found.items() if n not in skipped}
    handles = []
    try:
        for name, seen in inputs.items():
            handles.append(found[name]._input_quantizer.register_forward_pre_hook(seen.hook))
        run_batches(
            model,
            batches,
            "smooth_quant (inputs)",
            quantized=False,
            forward=forward,
            progress=progress,
            together=together,
        )
    finally:
        for handle in handles:
            handle.remove()
    if together:
        _unite_maxima(inputs, found)
    skipped |= {n: "no batch reached it" for n, seen in inputs.items() if seen.maxima is None}
    rows, scales = [], {}
    candidates = _ALPHAS if alpha is None else (alpha,)
    reached = [n for n in inputs if n not in skipped]
    for name in tqdm(reached, desc="smooth_quant (alpha)", disable=not progress):
        trials = Trials(name, found[name], inputs.pop(name), method, options)
        best, before, after = trials.search(
            candidates, must_smooth=alpha is not None, together=together
        )
        rows.append(SmoothedLayer(name, best, before, after))
        if best is not None:
            scales[name] = trials.scale(best)
    if together:
        # Unlike machines may round differently.
        distributed.broadcast(list(scales.values()), 0)
    with _restored_on_failure(model, [found[name] for name in scales]):
        for name, scale in scales.items():
            apply_smoothing(found[name], scale)
        calibrate(model, batches, method, forward=forward, progress=progress, sync=sync, **options)
    return SmoothingReport(rows, {name: skipped[name] for name in found if name in skipped})


def _unite_maxima(inputs: dict[str, InputSample], layers: dict[str, Any]) -> None:
    """Give every process the maxima of all of them."""
    maxima = {}
    for name, seen in inputs.items():
        layer = layers[name]
        unseen = torch.full((channel_shape(layer)[0],), -1.0, device=layer.weight.device)
        maxima[name] = unseen if seen.maxima is None else seen.maxima.float().contiguous()
    distributed.all_reduce(list(maxima.values()), "max")
    for name, united in maxima.items():
        inputs[name].maxima = None if bool((united < 0).any()) else united


def _unfit(model: nn.Module, layers: dict[str, Any]) -> dict[str, str]:
    modules = Counter(id(child) for m in model.modules() for child in m._modules.values())
    parameters = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    reasons = {}
    for name, layer in layers.items():
        reason = _unfit_input(layer, getattr(layer, "_input_quantizer", None))
        if reason is None and modules[id(layer._input_quantizer)] > 1:
            reason = "its input quantizer is shared"
        if reason is None and "weight" not in layer._parameters:
            reason = "its weight is computed, not a parameter"
        if reason is None and parameters[id(layer.weight)] > 1:
            reason = "its weight is shared"
        if reason is None:
            reason = _unfit_weight(layer._weight_quantizer)
        if reason is not None:
            reasons[name] = reason
    return reasons


def _unfit_input(layer: Any, quantizer: Any) -> str | None:
    if not isinstance(quantizer, TensorQuantizer) or quantizer.disabled:
        return "its input is not quantized"
    if quantizer.axis is not None or quantizer.block_size is not None:
        return "its input is not quantized per tensor"
    if quantizer.fixed:
        return "the amax of its input is fixed"
    if quantizer.learns:
        return "the range of its input is learned; smooth before training"
    present, shape = quantizer.pre_quant_scale, channel_shape(layer)
    if present is not None and present.numel() > 1:
        per_channel = present.shape[-len(shape) :] == shape and present.numel() == shape[0]
        if not per_channel:
            return f"its pre_quant_scale of shape {tuple(present.shape)} is not per channel"
    return None


def _unfit_weight(quantizer: TensorQuantizer) -> str | None:
    if quantizer.disabled:
        return None
    if quantizer.fixed:
        return "the amax of its weight is fixed, as after adaround; smooth before"
    if quantizer.learns:
        return "the range of its weight is learned; smooth before training"
    return None


@contextmanager
def _restored_on_failure(model: nn.Module, layers: list[Any]) -> Iterator[None]:
    """Give parameters, buffers and calibrators of quantizers and `layers` back on an error."""
    quantizers = list(named_quantizers(model).values())
    calibrators = [(quantizer, quantizer.calibrator) for quantizer in quantizers]
    modules = [*layers, *(part for quantizer in quantizers for part in quantizer.modules())]
    tables = [table for m in modules for table in (m._parameters, m._buffers)]
    saved = [
        (table, [(key, t, None if t is None else t.detach().clone()) for key, t in table.items()])
        for table in tables
    ]
    try:
        yield
    except BaseException:
        for table, entries in saved:
            table.clear()
            for key, tensor, value in entries:
                if tensor is not None:
                    tensor.data.copy_(value)
                table[key] = tensor
        for quantizer, calibrator in calibrators:
            quantizer.calibrator = calibrator
        raise
