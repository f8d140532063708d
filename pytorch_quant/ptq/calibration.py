"""Post-training quantization: run batches, fill every amax, switch methods without a new pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pytorch_quant.batches import Forward, call_model, count
from pytorch_quant.calib import CalibrationError, Calibrator, HistogramCalibrator, MaxCalibrator
from pytorch_quant.calib.calibrators import METHODS
from pytorch_quant.nn.modes import named_quantizers, preserved_modes, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

# The options of each method, with what they accept.
_OPTIONS: dict[str, dict[str, str]] = {
    "max": {},
    "percentile": {"percentile": "a number from 0 to 100"},
    "mse": {"start_bin": "an int >= 1", "stride": "an int >= 1"},
    "entropy": {"start_bin": "an int >= 1", "stride": "an int >= 1"},
}


@dataclass(frozen=True)
class QuantizerRange:
    """What calibration gave one quantizer.

    Attributes:
        name: Its qualified name.
        method: The method that chose the amax; `fixed` where the descriptor did, `dynamic` where
            the range is taken at run time.
        amax: The amax, real units, shape `()` or per channel; None for a dynamic quantizer.
    """

    name: str
    method: str
    amax: Tensor | None


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did; `print` it for a table.

    Attributes:
        ranges: One row for each quantizer that has a range, in the order of the model.
        unreached: Names of the quantizers that no batch reached; they have no new amax.
        batches: Batches that were run.
    """

    ranges: list[QuantizerRange]
    unreached: list[str] = field(default_factory=list)
    batches: int = 0

    def __str__(self) -> str:
        rows = [("quantizer", "method", "amax")]
        rows += [(row.name, row.method, _shown(row.amax)) for row in self.ranges]
        rows += [(name, "not reached", "-") for name in self.unreached]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


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
    With any method but `"max"` histograms are kept, from which `compute_amax` serves every method
    without another pass. Weights need no data. Quantizers that are disabled, dynamic, or have a
    fixed amax in their descriptor are left as they are.

    Args:
        model: Holds `TensorQuantizer` modules.
        batches: A tensor is passed to the model as it is, a mapping as keywords, a tuple or list
            as arguments; the second item of a pair is a target and dropped where the model takes
            one required argument.
        method: How activations are ranged: `max`, `percentile`, `mse` or `entropy`.
        forward: `forward(model, batch)` runs one batch instead of the rule above.
        progress: Show a progress bar.
        weight_method: How weights are ranged; one of the same methods.
        accumulate: Add to the statistics that are there instead of starting afresh.
        **options: Options of the method, such as `percentile=99.9`.

    Returns:
        The ranges, and the names of the quantizers that no batch reached.

    Raises:
        CalibrationError: NaN or Inf, or a negative value at an unsigned quantizer, naming the
            quantizer and the batch. Statistics from earlier batches are kept.
        RuntimeError: a batch on another device than the model.
        TypeError: a batch of a type that cannot be passed on.
        ValueError: unknown method, no quantizers, or no batches.
    """
    _check_arguments(method, weight_method, options)
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
    names = {quantizer: name for name, quantizer in quantizers.items()}
    collecting = [q for q in quantizers.values() if _takes_part(q) and not weights.get(q)]
    before = {quantizer: quantizer._calibrator for quantizer in collecting}
    seen = 0
    try:
        for quantizer in collecting:
            wanted = weight_method if quantizer in weights else method
            _prepare_calibrator(quantizer, wanted, accumulate, names[quantizer])
        # Not inference mode: a model may keep tensors that it makes in its first forward pass.
        with preserved_modes(model), torch.no_grad():
            model.eval()
            for quantizer in quantizers.values():
                quantizer.disable_quant()
                quantizer.disable_clip()
                quantizer.disable_calib()
            for quantizer in collecting:
                quantizer.enable_calib()
            bar = tqdm(
                batches, desc=f"calibrate ({method})", total=count(batches), disable=not progress
            )
            for batch in bar:
                try:
                    (forward or call_model)(model, batch)
                except CalibrationError as error:
                    raise CalibrationError(f"calibration batch {seen}: {error}") from error
                seen += 1
        if not seen:
            raise ValueError("no batches to calibrate on: the loader is empty")
    except BaseException:
        if not seen:
            # Nothing new was learned: what was known before is still the best.
            for quantizer, calibrator in before.items():
                quantizer._calibrator = calibrator
        raise
    return _fill(model, method, weight_method, options, seen)


def compute_amax(
    model: nn.Module, method: str, *, weight_method: str = "max", **options: Any
) -> CalibrationReport:
    """Fill the amax of every quantizer, in place, by another method from the same statistics.

    Args:
        model: Calibrated before, by `calibrate` or by a loop over its quantizers.
        method: How activations are ranged: `max`, `percentile`, `mse` or `entropy`.
        weight_method: How weights are ranged; they are read again, and need no data.
        **options: Options of the method, such as `percentile=99.9`.

    Returns:
        The ranges, and the names of the quantizers that have seen nothing.

    Raises:
        RuntimeError: no quantizer has seen anything, naming them all.
        ValueError: unknown method, or one whose statistics were not collected, naming the
            quantizers.
    """
    _check_arguments(method, weight_method, options)
    return _fill(model, method, weight_method, options, 0)


def _fill(
    model: nn.Module, method: str, weight_method: str, options: dict[str, Any], batches: int
) -> CalibrationReport:
    weights = weight_quantizers(model)
    found: dict[TensorQuantizer, tuple[str, Tensor | None]] = {}
    unreached, uncollected, activations = [], [], 0
    quantizers = named_quantizers(model)
    for name, quantizer in quantizers.items():
        if not _takes_part(quantizer):
            continue
        seen_weights = weights.get(quantizer)
        activations += quantizer not in weights
        calibrator = quantizer._calibrator
        wanted = weight_method if quantizer in weights else method
        if seen_weights:
            calibrator = _calibrate_weights(quantizer, seen_weights, weight_method, name)
        if calibrator is None:
            unreached.append(name)
        elif isinstance(calibrator, MaxCalibrator) and wanted != "max":
            uncollected.append(name)
        else:
            keywords = {} if isinstance(calibrator, MaxCalibrator) else {"method": wanted}
            keywords |= options if wanted == method and keywords and not seen_weights else {}
            amax = calibrator.compute_amax(**keywords)
            if amax is None:
                unreached.append(name)
            else:
                found[quantizer] = (wanted, amax)
    if uncollected:
        raise ValueError(
            f"only maxima were collected by {', '.join(uncollected)}, which cannot answer "
            f"{method!r}; calibrate with method= (for weights weight_method=) any but 'max' first"
        )
    if activations and unreached and not any(q not in weights for q in found):
        raise RuntimeError(
            f"no amax: {len(unreached)} quantizer(s) have seen no tensor: {', '.join(unreached)}; "
            "run calibrate(model, batches) first"
        )
    for quantizer, (_, amax) in found.items():
        assert amax is not None
        quantizer._store_amax(amax)
        if quantizer._learn_amax:
            quantizer.init_learn_amax()
    if unreached:
        warnings.warn(
            f"{len(unreached)} quantizer(s) were not reached and have no new amax: "
            f"{', '.join(unreached)}",
            stacklevel=3,
        )
    return CalibrationReport(_rows(quantizers, found), unreached, batches)


def _rows(
    quantizers: dict[str, TensorQuantizer],
    found: dict[TensorQuantizer, tuple[str, Tensor | None]],
) -> list[QuantizerRange]:
    rows = []
    for name, quantizer in quantizers.items():
        if quantizer in found:
            amax = quantizer.amax
            rows.append(
                QuantizerRange(name, found[quantizer][0], None if amax is None else amax.clone())
            )
        elif quantizer.dynamic:
            rows.append(QuantizerRange(name, "dynamic", None))
        elif quantizer.fixed and quantizer.amax is not None:
            rows.append(QuantizerRange(name, "fixed", quantizer.amax.clone()))
    return rows


def _takes_part(quantizer: TensorQuantizer) -> bool:
    return not (quantizer.disabled or quantizer.dynamic or quantizer.fixed)


def _check_arguments(method: Any, weight_method: Any, options: dict[str, Any]) -> None:
    """Refuse what could only fail once the batches have run."""
    for argument, value in (("method", method), ("weight_method", weight_method)):
        if value not in METHODS:
            raise ValueError(f"unknown {argument} {value!r}; use one of {', '.join(METHODS)}")
    for name, value in options.items():
        accepted = _OPTIONS[method].get(name)
        if accepted is None:
            known = ", ".join(_OPTIONS[method]) or "none"
            raise TypeError(f"method {method!r} has no option {name!r}; its options: {known}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "percentile":
            right = number and 0 <= value <= 100
        else:
            right = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not right:
            raise ValueError(f"{name}={value!r} is out of range; use {accepted}")


def _prepare_calibrator(
    quantizer: TensorQuantizer, method: str, accumulate: bool, name: str
) -> None:
    kind = MaxCalibrator if method == "max" else HistogramCalibrator
    present = quantizer._calibrator
    if present is not None and type(present) not in (MaxCalibrator, HistogramCalibrator):
        # The user's own calibrator: only it can start itself afresh.
        if not accumulate:
            present.reset()
        return
    if accumulate and type(present) is kind:
        return
    if accumulate and present is not None and present.compute_amax("max") is not None:
        raise ValueError(
            f"{name} holds statistics of {type(present).__name__}, to which {method!r} cannot "
            "add; calibrate with the same kind of method, or with accumulate=False"
        )
    quantizer._calibrator = quantizer._make_calibrator("max" if method == "max" else "histogram")


def _calibrate_weights(
    quantizer: TensorQuantizer, weights: list[Tensor], method: str, name: str
) -> Calibrator:
    _prepare_calibrator(quantizer, method, False, name)
    calibrator = quantizer._calibrator
    assert calibrator is not None
    for weight in weights:
        try:
            quantizer.collect(weight)
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}") from error
        except RuntimeError as error:
            raise ValueError(
                f"{name} is shared by weights whose kept axes differ in size: {error}"
            ) from error
    return calibrator


def _shown(amax: Tensor | None) -> str:
    if amax is None:
        return "at run time"
    if amax.numel() == 1:
        return f"{float(amax):.6g}"
    return f"{float(amax.min()):.6g} to {float(amax.max()):.6g} ({amax.numel()} channels)"
