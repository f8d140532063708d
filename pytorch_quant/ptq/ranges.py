"""From statistics to amax, for all quantizers of a model at once."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from pytorch_quant.calib import CalibrationError, Calibrator, HistogramCalibrator, MaxCalibrator
from pytorch_quant.calib.calibrators import compute_together
from pytorch_quant.calib.faults import raise_named
from pytorch_quant.calib.methods import MAXIMA_METHODS
from pytorch_quant.distributed import whole
from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.ptq.options import COLLECTING, check_methods, check_options
from pytorch_quant.ptq.report import CalibrationReport, QuantizerRange


def compute_amax(
    model: nn.Module, method: str, *, weight_method: str = "max", **options: Any
) -> CalibrationReport:
    """Fill the amax of every quantizer, in place, by another method from the same statistics.

    It talks to no other process, as all of them hold the same statistics after `calibrate`; only
    where FSDP2 has sharded the weights do all have to call it, to see them whole.

    Args:
        model: Calibrated before, by `calibrate` or by a loop over its quantizers.
        method: How activations are ranged; one of `pytorch_quant.calib.methods.METHODS`.
        weight_method: How weights are ranged; they are read again, and need no data.
        **options: Options of the method, such as `percentile=99.9`.

    Returns:
        The ranges, and the names of the quantizers that have seen nothing.

    Raises:
        RuntimeError: no quantizer has seen anything, naming them all.
        TypeError: an option that the method does not have.
        ValueError: an unknown method, an option out of range, or a method whose statistics were
            not collected, naming the quantizers.
    """
    check_methods(method, weight_method)
    options = check_options(method, options)
    for name in COLLECTING:
        if name in options:
            raise TypeError(
                f"{name!r} takes effect while batches run; pass it to calibrate(method={method!r})"
            )
    return fill(model, method, weight_method, options, 0)


def takes_part(quantizer: TensorQuantizer) -> bool:
    """Whether calibration gives this quantizer a range."""
    return not (quantizer.disabled or quantizer.dynamic or quantizer.fixed)


def prepare_calibrator(
    quantizer: TensorQuantizer, method: str, accumulate: bool, name: str
) -> None:
    """Give the quantizer a fresh calibrator for the method, unless it adds to what it has.

    One of the right kind keeps its settings, such as the number of bins.

    Raises:
        ValueError: it holds statistics of another kind, to which the method cannot add.
    """
    kind = MaxCalibrator if method in MAXIMA_METHODS else HistogramCalibrator
    present = quantizer.calibrator
    if present is not None and type(present) not in (MaxCalibrator, HistogramCalibrator):
        # The user's own calibrator: only it can start itself afresh.
        if not accumulate:
            present.reset()
        return
    if accumulate and type(present) is kind:
        # It was made on the batches before.
        present.best = None
        return
    if accumulate and present is not None and present.seen:
        raise ValueError(
            f"{name} holds statistics of {type(present).__name__}, to which {method!r} cannot "
            "add; calibrate with the same kind of method, or with accumulate=False"
        )
    # A new object: the one before comes back if no batch arrives.
    histogram = kind is HistogramCalibrator
    quantizer.calibrator = quantizer.fresh_calibrator("histogram" if histogram else "max")


def fill(
    model: nn.Module, method: str, weight_method: str, options: dict[str, Any], batches: int
) -> CalibrationReport:
    """Store the amax of every quantizer; nothing is stored if any of them cannot have one."""
    weights = weight_quantizers(model)
    quantizers = named_quantizers(model)
    taking = {name: q for name, q in quantizers.items() if takes_part(q)}
    for name, quantizer in taking.items():
        if weights.get(quantizer):
            _collect_weights(quantizer, weights[quantizer], weight_method, name)
    asked = {name: weight_method if q in weights else method for name, q in taking.items()}
    answers = _ask(taking, asked, method, options, {n for n, q in taking.items() if weights.get(q)})
    found = {taking[name]: answer for name, answer in answers.items() if answer is not None}
    unreached = [name for name in taking if taking[name] not in found]
    activations = any(q not in weights for q in taking.values())
    if activations and unreached and not any(q not in weights for q in found):
        raise RuntimeError(
            f"no amax: {len(unreached)} quantizer(s) have seen no tensor: {', '.join(unreached)}; "
            "run calibrate(model, batches) first"
        )
    for quantizer, (_, amax) in found.items():
        quantizer.set_range(amax)
    if unreached:
        warnings.warn(
            f"{len(unreached)} quantizer(s) were not reached and have no new amax: "
            f"{', '.join(unreached)}",
            stacklevel=3,
        )
    return CalibrationReport(_rows(quantizers, found), unreached, batches)


def _ask(
    taking: dict[str, TensorQuantizer],
    asked: dict[str, str],
    method: str,
    options: dict[str, Any],
    from_weights: set[str],
) -> dict[str, tuple[str, Tensor] | None]:
    """The method and the amax for each name; None where nothing was seen."""
    options = {name: value for name, value in options.items() if name not in COLLECTING}
    answers: dict[str, tuple[str, Tensor] | None] = {}
    together: dict[tuple[str, bool], list[str]] = {}
    uncollected = []
    raise_named({name: quantizer.calibrator for name, quantizer in taking.items()})
    for name, quantizer in taking.items():
        calibrator, wanted = quantizer.calibrator, asked[name]
        # Options are those of the method for activations.
        takes_options = wanted == method and name not in from_weights
        if calibrator is None:
            answers[name] = None
        elif isinstance(calibrator, MaxCalibrator) and wanted not in MAXIMA_METHODS:
            uncollected.append(name)
        elif type(calibrator) in (MaxCalibrator, HistogramCalibrator):
            together.setdefault((wanted, takes_options), []).append(name)
        else:
            amax = calibrator.compute_amax(wanted, **(options if takes_options else {}))
            answers[name] = None if amax is None else (wanted, amax)
    if uncollected:
        raise ValueError(
            f"only maxima were collected by {', '.join(uncollected)}, which cannot answer "
            f"{method!r}; calibrate with one of the other methods first (for weights with "
            "weight_method=)"
        )
    for (wanted, takes_options), names in together.items():
        calibrators: list[Any] = [taking[name].calibrator for name in names]
        found = compute_together(calibrators, wanted, **(options if takes_options else {}))
        for name, calibrator, amax in zip(names, calibrators, found, strict=True):
            shown = f"best: {calibrator.best}" if wanted == "best" else wanted
            answers[name] = None if amax is None else (shown, amax)
    return answers


def _rows(
    quantizers: dict[str, TensorQuantizer], found: dict[TensorQuantizer, tuple[str, Tensor]]
) -> list[QuantizerRange]:
    rows = []
    for name, quantizer in quantizers.items():
        amax = None if quantizer.amax is None else quantizer.amax.clone()
        if quantizer in found:
            method, stored = found[quantizer]
            calibrator = quantizer.calibrator
            seen = clipped = None
            if isinstance(calibrator, Calibrator):
                seen = calibrator.seen
                clipped = calibrator.share_above(stored * (quantizer.scale_amax or 1.0))
            rows.append(QuantizerRange(name, method, amax, seen, clipped))
        elif quantizer.dynamic:
            rows.append(QuantizerRange(name, "dynamic", None))
        elif quantizer.fixed and amax is not None:
            rows.append(QuantizerRange(name, "fixed", amax))
    return rows


def _collect_weights(
    quantizer: TensorQuantizer, weights: list[Tensor], method: str, name: str
) -> None:
    prepare_calibrator(quantizer, method, False, name)
    for weight in weights:
        try:
            quantizer.collect(whole(weight))
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}") from error
        except RuntimeError as error:
            raise ValueError(
                f"{name} is shared by weights whose kept axes differ in size: {error}"
            ) from error
