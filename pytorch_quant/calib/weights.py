"""The amax of weights from the weights alone: no batches, no forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pytorch_quant.axes import Axis
from pytorch_quant.calib.calibrator import Calibrator
from pytorch_quant.calib.calibrators import HistogramCalibrator, MaxCalibrator
from pytorch_quant.calib.histogram import CalibrationError
from pytorch_quant.calib.methods import WEIGHT_METHODS
from pytorch_quant.calib.search import check_percentile


def calibrate_weights(
    model: nn.Module,
    method: str = "percentile",
    perchannel: bool = True,
    percentile: float = 99.99,
    num_bins: int = 2048,
) -> None:
    """Set the amax of every weight quantizer of `model`, in place, from the weights.

    Per channel, a quantizer keeps the axis that it has. One that is per tensor takes the output
    channel: axis 0, or 1 in a transposed convolution. Three kinds have no such axis and stay per
    tensor: learned ranges, weights of no dimension, and grouped transposed convolutions, where
    axis 1 holds the channels of one group only. A quantizer of blocks keeps its blocks in either
    case.

    Disabled quantizers take part. Those whose descriptor fixes the amax, and dynamic ones, do not.
    A quantizer that several layers share gets one amax for all their weights. If an error is
    raised, no amax has been changed.

    Args:
        model: Holds layers with weight quantizers.
        method: `"max"`, `"percentile"`, `"mse"`, `"entropy"` or `"lp"`; see
            `pytorch_quant.calib.methods`.
        perchannel: One amax per output channel; if false, one per weight, and the quantizer's
            axis becomes None.
        percentile: In percent, 0 to 100, of the magnitudes; for `method="percentile"`.
        num_bins: Bins of the histogram of each channel, for all methods but `"max"`.

    Raises:
        CalibrationError: NaN or Inf in a weight, or negative values at an unsigned quantizer.
        RuntimeError: layers that share a quantizer have different numbers of channels.
        TypeError: `percentile` is no number.
        ValueError: an unknown method, no weight quantizer in the model, `percentile` or
            `num_bins` out of range, or a quantizer whose axis its weight does not have.

    Warns:
        UserWarning: quantizers that got no amax, as their layer does not show their weight.
    """
    if method not in WEIGHT_METHODS:
        raise ValueError(f"unknown method {method!r}; use one of {', '.join(WEIGHT_METHODS)}")
    check_percentile(percentile)
    names = {module: name for name, module in model.named_modules()}
    found: dict[Any, tuple[nn.Module, list[Tensor]]] = {}
    for layer in names:
        for quantizer, weight in _shown_weights(layer):
            found.setdefault(quantizer, (layer, []))[1].append(weight)
    if not found:
        raise ValueError(
            "the model has no weight quantizer; call quantize(model, example_inputs=...) on it, "
            "or quant_modules.initialize() before it is built"
        )
    ready: list[tuple[Any, Axis, Tensor]] = []
    missed: list[str] = []
    for quantizer, (layer, weights) in found.items():
        if getattr(quantizer, "fixed", False) or getattr(quantizer, "dynamic", False):
            continue
        axis = _axis_of(quantizer, layer, weights, perchannel)
        calibrator = _make_calibrator(quantizer, axis, method, num_bins)
        try:
            for weight in weights:
                if weight.numel():
                    quantizer.collect(weight, calibrator)
            options = {} if method == "max" else {"method": method, "percentile": percentile}
            amax = calibrator.compute_amax(**options)
        except (RuntimeError, ValueError) as error:
            # Other subclasses, such as out of memory, keep their own form.
            if type(error) not in (CalibrationError, RuntimeError, ValueError):
                raise
            raise type(error)(f"{names[quantizer] or type(quantizer).__name__}: {error}") from error
        if amax is None:
            missed.append(names[quantizer])
        else:
            ready.append((quantizer, axis, amax))
    for quantizer, axis, amax in ready:
        quantizer.axis = axis
        quantizer.amax = amax
    if missed:
        warnings.warn(
            f"{len(missed)} weight quantizer(s) have no new amax, as their layer shows them no "
            f"weight: {', '.join(missed)}; give the layer weights_to_quantize(), or calibrate "
            "them with batches",
            stacklevel=2,
        )


def _shown_weights(layer: Any) -> Iterator[tuple[Any, Tensor]]:
    """The weight quantizers of a layer with what each sees; an empty tensor if that is unknown."""
    shown = layer.weights_to_quantize() if hasattr(layer, "weights_to_quantize") else []
    quantizer = getattr(layer, "_weight_quantizer", None)
    if all(quantizer is not known for known, _ in shown):
        weight = getattr(layer, "weight", None)
        shown = [*shown, (quantizer, weight if isinstance(weight, Tensor) else torch.empty(0))]
    # What takes the place of a quantizer, such as nn.Identity, collects nothing.
    yield from (pair for pair in shown if hasattr(pair[0], "collect"))


def _axis_of(quantizer: Any, layer: nn.Module, weights: list[Tensor], perchannel: bool) -> Axis:
    if getattr(quantizer, "block_size", None) is not None:
        return quantizer.axis
    if not perchannel:
        return None
    if quantizer.axis is not None:
        return quantizer.axis
    grouped = isinstance(layer, _ConvTransposeNd) and layer.groups > 1
    if getattr(quantizer, "learns", False) or grouped or weights[0].dim() == 0:
        return None
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def _make_calibrator(quantizer: Any, axis: Axis, method: str, num_bins: int) -> Calibrator:
    # The blocks of a block quantizer reach the calibrator as the rows of a matrix.
    axis = axis if getattr(quantizer, "block_size", None) is None else 0
    if method == "max":
        return MaxCalibrator(quantizer.num_bits, axis, quantizer.unsigned)
    return HistogramCalibrator(quantizer.num_bits, axis, quantizer.unsigned, num_bins)
