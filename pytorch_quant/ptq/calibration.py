"""One pass of batches through a model: statistics for every quantizer, and their amax."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pytorch_quant import distributed
from pytorch_quant.batches import Forward, call_model, copied, count, each
from pytorch_quant.calib import CalibrationError, Calibrator, HistogramCalibrator, MaxCalibrator
from pytorch_quant.calib.faults import one_pass, raise_named
from pytorch_quant.calib.observation import shared_observations
from pytorch_quant.nn.compiled import uncompiled
from pytorch_quant.nn.modes import named_quantizers, preserved_modes, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.ptq.best import choose_alike
from pytorch_quant.ptq.lockstep import faults_wait, in_step
from pytorch_quant.ptq.options import check_methods, check_options
from pytorch_quant.ptq.ranges import fill, prepare_calibrator, takes_part
from pytorch_quant.ptq.report import CalibrationReport
from pytorch_quant.ptq.sync import (
    Agreement,
    agreeing,
    check_same,
    describe,
    start_once,
    take_first,
    unite,
)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "max",
    *,
    forward: Forward | None = None,
    progress: bool = True,
    weight_method: str = "max",
    accumulate: bool = False,
    sync: bool = True,
    **options: Any,
) -> CalibrationReport:
    """Fill the amax of every quantizer of `model`, in place, from batches and weights.

    Runs the model in eval mode, without gradients and unquantized, and restores every mode.
    Methods of maxima (`max`, `mean_max`, `moving_max`) keep maxima only; any other keeps
    histograms, from which `compute_amax` serves every method without another pass. Weights need no
    data. Quantizers that are disabled, dynamic, or have a fixed amax in their descriptor are left
    as they are.

    An interrupt or an error keeps the statistics of the batches before it: `compute_amax` uses
    them, `save_calibration` stores them, and `accumulate=True` goes on from them. Nothing of the
    batch that was running is kept, and where it was the first, all is as before the call; but a
    calibrator of the user's own keeps what it has collected.

    In a torch.distributed process group every process calls this with its share of the batches,
    any number of them, also none. All get the statistics and the amax that one process would get
    from all batches: the same bits, but `mean_max` to a relative 1e-6; `moving_max` and `best` are
    those of the first process that has a batch. An error of one process is raised there and, as
    a RuntimeError naming its rank, in the others, which keep what they have collected; an
    interrupt stops one process alone. Statistics that all processes share, from such a
    calibration or from `load_calibration`, count once with `accumulate=True`.
    DistributedDataParallel broadcasts its buffers once. With FSDP2 (`fully_shard`) the processes
    run in step; one that has run out of batches repeats its last one uncounted. There an error
    inside the model's own forward pass leaves the other processes to their timeout.

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
        sync: Combine the statistics of all processes of the group; if false, of this one alone,
            without any communication.
        **options: Options of the method: `percentile=99.9`; `p=2.4` of `lp`; `start_bin`, `stride`
            of `mse`, `entropy` and `lp`; `momentum=0.9` of `moving_max`; `sample_batches=1` of
            `best`.

    Returns:
        The ranges, and the names of the quantizers that no batch reached.

    Raises:
        CalibrationError: NaN or Inf, or a negative value at an unsigned quantizer, naming the
            quantizer and the batch. Statistics from earlier batches are kept. On an accelerator
            the error comes at the end of the pass, or of the next one that accumulates if this
            is interrupted; of the bad batch itself the tensors before the bad one are kept, and
            no later batch.
        RuntimeError: a batch on another device than the model, or an error of another process.
        TypeError: a batch of a type that cannot be passed on, an option that the method does not
            have, a calibrator whose statistics cannot be combined, or a model in
            FullyShardedDataParallel.
        ValueError: unknown method, option out of range, no quantizers, no batches, processes whose
            models or arguments differ, or `sync=False` for a model that FSDP2 has sharded.
    """
    together = sync and distributed.world_size() > 1
    with agreeing(together):
        check_methods(method, weight_method)
        options = check_options(method, options)
        quantizers = _quantizers_of(model, batches)
        weights = weight_quantizers(model)
        lockstep = distributed.forward_communicates(model)
        if lockstep and not sync:
            raise ValueError(
                "a forward pass of a model that is sharded over processes needs all of them; use "
                "sync=True, or calibrate before fully_shard"
            )
    collecting = {name: q for name, q in quantizers.items() if takes_part(q) and not weights.get(q)}
    activations = {name: q for name, q in collecting.items() if q not in weights}
    before = {quantizer: quantizer.calibrator for quantizer in collecting.values()}
    restore = _snapshot(before.values())
    progress = progress and not (together and distributed.rank())
    keep = options.get("sample_batches", 1) if method == "best" else 0
    ran = Agreement()
    try:
        with agreeing(together) as start:
            if accumulate:
                raise_named({name: q.calibrator for name, q in collecting.items()})
            for name, quantizer in collecting.items():
                wanted = weight_method if quantizer in weights else method
                prepare_calibrator(quantizer, wanted, accumulate, name)
                if "momentum" in options and isinstance(quantizer.calibrator, Calibrator):
                    quantizer.calibrator.momentum = options["momentum"]
            start_once(collecting, accumulate, together)
            if together:
                arguments = {"method": method, "weight_method": weight_method, **options}
                start.value = describe(collecting, accumulate=accumulate, **arguments)
        if together:
            check_same(start.values)
        # Not inference mode: a model may keep tensors that it makes in its first forward pass.
        with (
            preserved_modes(model),
            uncompiled(),
            distributed.buffers_stay(model, agree=together),
            torch.no_grad(),
        ):
            model.eval()
            _set_modes(quantizers.values(), collecting.values())
            total = count(batches)
            bar = tqdm(
                each(batches) if total is None else batches,
                desc=f"calibrate ({method})",
                total=total,
                disable=not progress,
            )
            with agreeing(together) as ran:
                sample = _run(model, bar, forward, quantizers, collecting, lockstep, keep, ran)
            if not any(ran.values):
                raise ValueError("no batches to calibrate on: the loader is empty")
            if together:
                unite(collecting)
            if keep:
                _set_modes(quantizers.values(), ())
                choose_alike(
                    model, activations, sample, forward, progress, ran.values, together, lockstep
                )
    except BaseException:
        if not any(ran.values):
            # Nothing new was learned: what was known before is still the best.
            for quantizer, calibrator in before.items():
                quantizer.calibrator = calibrator
            restore()
        raise
    with agreeing(together):
        report = fill(model, method, weight_method, options, sum(ran.values))
    if together:
        take_first(activations, report)
    return report


def _quantizers_of(model: nn.Module, batches: Any) -> dict[str, TensorQuantizer]:
    if isinstance(batches, Tensor):
        raise TypeError(
            f"batches is one tensor of shape {tuple(batches.shape)}; pass an iterable of batches, "
            "such as [tensor]"
        )
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(
            f"batches is {batches!r} of type {type(batches).__name__}; pass an iterable of "
            "batches, such as a DataLoader or a list of tensors"
        )
    quantizers = named_quantizers(model)
    if not quantizers:
        raise ValueError(
            "the model has no TensorQuantizer; call quantize(model, example_inputs=...) on it, or "
            "quant_modules.initialize() before it is built"
        )
    return quantizers


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    quantizers: dict[str, TensorQuantizer],
    collecting: dict[str, TensorQuantizer],
    lockstep: bool,
    keep: int,
    stage: Agreement,
) -> list[Any]:
    """Show every batch to the model, counting in `stage.value`; returns copies of the first `keep`.

    Of a batch that does not come to its end no statistics are kept.
    """
    stage.value = 0
    sample: list[Any] = []
    calibrators = [quantizer.calibrator for quantizer in collecting.values()]
    restore = _snapshot(calibrators)
    waiting = faults_wait(collecting.values() if lockstep else ())
    with shared_observations(), one_pass() as current, waiting as faults:
        try:
            for batch, own in in_step(batches, faults) if lockstep else zip(batches, repeat(True)):
                if not own:
                    _set_modes(quantizers.values(), ())
                if len(sample) < keep:
                    # The model may write to its inputs.
                    sample.append(copied(batch))
                current.batch = stage.value
                stage.alone = lockstep
                (forward or call_model)(model, batch)
                stage.alone = False
                if own and faults.first is None:
                    done = _snapshot(calibrators)
                    # One statement without a call: an interrupt comes before or after it.
                    stage.value, restore = current.batch + 1, done
        except BaseException as error:
            restore()
            if isinstance(error, CalibrationError):
                raise CalibrationError(f"calibration batch {stage.value}: {error}") from error
            raise
    return sample


def _snapshot(calibrators: Iterable[Calibrator | None]) -> Callable[[], None]:
    """A function that brings the statistics of this moment back, but to calibrators of the user."""
    known = (MaxCalibrator, HistogramCalibrator)
    held = [c.snapshot() for c in calibrators if c is not None and type(c) in known]

    def restore() -> None:
        for each_restore in held:
            each_restore()

    return restore


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
