"""The method `best`: for each quantizer, the one that harms the output of its layer least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pytorch_quant import distributed
from pytorch_quant.batches import Forward, call_model, copied, tensors_in
from pytorch_quant.calib import HistogramCalibrator
from pytorch_quant.calib.calibrators import compute_together
from pytorch_quant.calib.faults import raise_named
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.ptq.sync import agreeing

CANDIDATES = ("max", "percentile", "mse", "entropy", "lp")
# For a quantizer that the sample does not reach: the least error of the tensor itself.
_UNSAMPLED = "mse"


def choose_best(
    model: nn.Module,
    quantizers: dict[str, TensorQuantizer],
    sample: Sequence[Any],
    forward: Forward | None,
    progress: bool,
) -> None:
    """Set the `best` method of the calibrator of each quantizer.

    The layer of a quantizer is the module that holds it; one that is shared has several. Whenever
    one of them runs on the sample, it runs again for every candidate method with this quantizer
    alone quantizing; the sum of the squared differences of their outputs decides, the earlier
    candidate among equals. Quantizers do not quantize on entry; the layers see float inputs.

    Args:
        model: In eval mode, its quantizers neither quantizing nor collecting.
        quantizers: By qualified name, with histograms.
        sample: Batches.
        forward: As in `calibrate`.
        progress: Show a progress bar.

    Raises:
        CalibrationError: a bad batch was met on an accelerator, naming the quantizer.
    """
    judged = {
        name: quantizer
        for name, quantizer in quantizers.items()
        if isinstance(quantizer.calibrator, HistogramCalibrator) and quantizer.calibrator.seen
    }
    raise_named({name: quantizer.calibrator for name, quantizer in quantizers.items()})
    calibrators = [quantizer.calibrator for quantizer in judged.values()]
    amax = {method: compute_together(calibrators, method) for method in CANDIDATES}  # type: ignore[arg-type]
    trials = {
        name: _Trial(quantizer, {m: a for m in CANDIDATES if (a := amax[m][i]) is not None})
        for i, (name, quantizer) in enumerate(judged.items())
    }
    trial_of: dict[nn.Module, _Trial] = {trial.quantizer: trial for trial in trials.values()}
    layers: dict[nn.Module, list[_Trial]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        trial = trial_of.get(module)
        if trial is not None:
            members = layers.setdefault(_layer_of(model, name), [])
            # A shared layer has several names.
            if trial not in members:
                members.append(trial)
    with _judging(layers):
        for batch in tqdm(sample, desc="calibrate (best of methods)", disable=not progress):
            (forward or call_model)(model, batch)
    for calibrator, trial in zip(calibrators, trials.values(), strict=True):
        assert calibrator is not None
        calibrator.best = trial.winner()


def choose_alike(
    model: nn.Module,
    quantizers: dict[str, TensorQuantizer],
    sample: Sequence[Any],
    forward: Forward | None,
    progress: bool,
    counts: Sequence[int],
    together: bool,
    lockstep: bool,
) -> None:
    """`choose_best`, with the choice of the first process that has a batch for all of them.

    Args:
        model: In eval mode, its quantizers neither quantizing nor collecting.
        quantizers: By qualified name.
        sample: Batches of this process.
        forward: As in `calibrate`.
        progress: Show a progress bar.
        counts: Batches of each process.
        together: There are several processes.
        lockstep: Forward passes are collective: the others run the same trials, in vain.

    Raises:
        RuntimeError: another process failed.
    """
    first = next(rank for rank, batches in enumerate(counts) if batches)
    with agreeing(together) as stage:
        if lockstep or not together or distributed.rank() == first:
            stage.alone = lockstep
            choose_best(model, quantizers, sample[: counts[first]], forward, progress)
            stage.alone = False
        stage.value = {name: getattr(q.calibrator, "best", None) for name, q in quantizers.items()}
    if together:
        for name, quantizer in quantizers.items():
            if isinstance(quantizer.calibrator, HistogramCalibrator):
                quantizer.calibrator.best = stage.values[first][name]


class _Trial:
    """The summed squared output error of each candidate amax of one quantizer."""

    def __init__(self, quantizer: TensorQuantizer, amax: dict[str, Tensor]) -> None:
        self.quantizer = quantizer
        self.amax = amax
        self.errors: dict[str, Tensor] = {}

    def run(self, layer: nn.Module, args: Any, kwargs: Any, expected: Any) -> None:
        for method, amax in self.amax.items():
            with _only(self.quantizer, amax):
                got = layer(*copied(args), **copied(kwargs))
            error = _squared_difference(got, expected)
            self.errors[method] = self.errors[method] + error if method in self.errors else error

    def winner(self) -> str:
        errors = {method: float(error) for method, error in self.errors.items()}
        return min(errors, key=errors.__getitem__) if errors else _UNSAMPLED


@contextmanager
def _judging(layers: dict[nn.Module, list[_Trial]]) -> Iterator[None]:
    """Run the trials of each layer whenever the model runs it, on the inputs it had."""
    running: list[nn.Module] = []
    inputs: dict[nn.Module, list[Any]] = {}

    def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
        if not running:
            # A layer may write to its inputs.
            inputs.setdefault(layer, []).append((copied(args), copied(kwargs)))

    def after(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if running:
            return
        running.append(layer)
        try:
            args, kwargs = inputs[layer].pop()
            for trial in layers[layer]:
                trial.run(layer, args, kwargs, output)
        finally:
            running.pop()

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _only(quantizer: TensorQuantizer, amax: Tensor) -> Iterator[None]:
    """Quantize with `amax`."""
    with quantizer.intercepted(lambda x, _: quantizer.leaving(quantizer.entering(x, amax))):
        # A recurrent layer calls no quantizers that are off.
        quantizer.enable_quant()
        try:
            yield
        finally:
            quantizer.disable_quant()


def _layer_of(model: nn.Module, name: str) -> nn.Module:
    """The module that runs the quantizer: its parent, lists passed over."""
    module = model
    layer = model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            layer = module
    return layer


def _squared_difference(got: Any, expected: Any) -> Tensor:
    parts = [
        (g.double() - e.double()).square().sum().cpu()
        for g, e in zip(tensors_in(got), tensors_in(expected), strict=True)
        if e.is_floating_point()
    ]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
