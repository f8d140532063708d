"""One pass of batches through a model: statistics for every quantizer, and their amax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pytorch_quant.batches import Forward, call_model, count
from pytorch_quant.calib import CalibrationError, Calibrator
from pytorch_quant.calib.counting import counting_threads
from pytorch_quant.calib.observation import shared_observations
from pytorch_quant.nn.modes import named_quantizers, preserved_modes, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.ptq.best import choose_best
from pytorch_quant.ptq.options import check_methods, check_options
from pytorch_quant.ptq.ranges import fill, prepare_calibrator, takes_part
from pytorch_quant.ptq.report import CalibrationReport


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "max",
    *,
    forward: Forward | None = None,
    progress: bool = True,
    weight_method: str = "max",
    accumulate: bool = False,
    **options: Any,
) -> CalibrationReport:
    """Fill the amax of every quantizer of `model`, in place, from batches and weights.

    Runs the model in eval mode, without gradients and unquantized, and restores every mode.
    Methods of maxima (`max`, `mean_max`, `moving_max`) keep maxima only; any other keeps
    histograms, from which `compute_amax` serves every method without another pass. Weights need no
    data. Quantizers that are disabled, dynamic, or have a fixed amax in their descriptor are left
    as they are.

    An interrupt or an error keeps the statistics of the batches before it: `compute_amax` uses
    them, `save_calibration` stores them, and `accumulate=True` goes on from them.

    Args:
        model: Holds `TensorQuantizer` modules.
        batches: A tensor is passed to the model as it is, a mapping as keywords, a tuple or list
            as arguments; the second item of a pair is a target and dropped where the model takes
            one required argument.
        method: How activations are ranged: `max`, `mean_max`, `moving_max`, `percentile`, `mse`,
            `entropy`, `lp`, or `best`, which chooses among them for each quantizer by the output
            error of its layer on the first batches; see `pytorch_quant.calib.methods`.
        forward: `forward(model, batch)` runs one batch instead of the rule above.
        progress: Show a progress bar.
        weight_method: How weights are ranged: `max`, `percentile`, `mse`, `entropy` or `lp`.
        accumulate: Add to the statistics that are there instead of starting afresh.
        **options: Options of the method: `percentile=99.9`; `p=2.4` of `lp`; `start_bin`, `stride`
            of `mse`, `entropy` and `lp`; `momentum=0.9` of `moving_max`; `sample_batches=1` of
            `best`.

    Returns:
        The ranges, and the names of the quantizers that no batch reached.

    Raises:
        CalibrationError: NaN or Inf, or a negative value at an unsigned quantizer, naming the
            quantizer and the batch. Statistics from earlier batches are kept. On an accelerator
            the error comes at the end of the pass.
        RuntimeError: a batch on another device than the model.
        TypeError: a batch of a type that cannot be passed on, or an option that the method does
            not have.
        ValueError: unknown method, option out of range, no quantizers, or no batches.
    """
    check_methods(method, weight_method)
    check_options(method, options)
    if isinstance(batches, Tensor):
        raise TypeError(
            f"batches is one tensor of shape {tuple(batches.shape)}; pass an iterable of batches, "
            "such as [tensor]"
        )
    quantizers = named_quantizers(model)
    if not quantizers:
        raise ValueError(
            "the model has no TensorQuantizer; call quant_modules.initialize() before it is built. "
            "(Layers that torch itself builds inside nn.MultiheadAttention, nn.Transformer and "
            "lazy modules are not replaced)"
        )
    weights = weight_quantizers(model)
    collecting = {
        name: q for name, q in quantizers.items() if takes_part(q) and not weights.get(q)
    }
    before = {quantizer: quantizer._calibrator for quantizer in collecting.values()}
    keep = options.get("sample_batches", 1) if method == "best" else 0
    sample: list[Any] = []
    seen = 0
    try:
        for name, quantizer in collecting.items():
            wanted = weight_method if quantizer in weights else method
            prepare_calibrator(quantizer, wanted, accumulate, name)
            if "momentum" in options and isinstance(quantizer._calibrator, Calibrator):
                quantizer._calibrator.momentum = options["momentum"]
        # Not inference mode: a model may keep tensors that it makes in its first forward pass.
        with preserved_modes(model), torch.no_grad():
            model.eval()
            _set_modes(quantizers.values(), collecting.values())
            bar = tqdm(
                batches, desc=f"calibrate ({method})", total=count(batches), disable=not progress
            )
            with counting_threads(), shared_observations():
                for batch in bar:
                    try:
                        (forward or call_model)(model, batch)
                    except CalibrationError as error:
                        raise CalibrationError(f"calibration batch {seen}: {error}") from error
                    seen += 1
                    if len(sample) < keep:
                        sample.append(batch)
            if sample:
                _set_modes(quantizers.values(), ())
                activations = {n: q for n, q in collecting.items() if q not in weights}
                choose_best(model, activations, sample, forward, progress)
        if not seen:
            raise ValueError("no batches to calibrate on: the loader is empty")
    except BaseException:
        if not seen:
            # Nothing new was learned: what was known before is still the best.
            for quantizer, calibrator in before.items():
                quantizer._calibrator = calibrator
        raise
    return fill(model, method, weight_method, options, seen)


def _set_modes(
    quantizers: Iterable[TensorQuantizer], collecting: Iterable[TensorQuantizer]
) -> None:
    """Let no quantizer quantize, and those of `collecting` collect."""
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.disable_clip()
        quantizer.disable_calib()
    for quantizer in collecting:
        quantizer.enable_calib()
