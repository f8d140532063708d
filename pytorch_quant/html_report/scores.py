"""Accuracy before and after, and what the parameters weigh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pytorch_quant.analysis.costs import FLOAT_BITS, bits_of
from pytorch_quant.analysis.sites import is_active
from pytorch_quant.analysis.switches import Switches
from pytorch_quant.nn.modes import preserved_modes, weight_quantizers

Evaluate = Callable[[nn.Module], float]


def checked_accuracy(accuracy: Any, evaluate: Any) -> dict[str, float]:
    """The scores that were given, as floats.

    Raises:
        TypeError: it is no mapping of names to numbers, or `evaluate` cannot be called.
        ValueError: both are given.
    """
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be a function of the model, got {evaluate!r}")
    if accuracy is None:
        return {}
    if evaluate is not None:
        raise ValueError("pass accuracy= (scores that you have) or evaluate= (measure), not both")
    if not isinstance(accuracy, Mapping):
        raise TypeError(
            f'accuracy is a mapping such as {{"float": 76.1, "int8": 75.9}}, got '
            f"{type(accuracy).__name__}"
        )
    return {str(name): _number(value, f"accuracy[{name!r}]") for name, value in accuracy.items()}


def measured_accuracy(
    switches: Switches,
    model: nn.Module,
    float_model: nn.Module | None,
    evaluate: Evaluate,
    progress: bool,
) -> dict[str, float]:
    """The score of the float model, or of `model` with all quantizers off, and of `model`.

    Raises:
        TypeError: `evaluate` returns no number.
    """
    scores = {}
    turns = {"float": model if float_model is None else float_model, "quantized": model}
    with preserved_modes(turns["float"]):
        turns["float"].eval()
        for label in tqdm(turns, "report: evaluate", disable=not progress):
            switches.use(switches.sites if label == "quantized" else [])
            # Each draws the same random numbers; those of the user come back later.
            torch.manual_seed(0)
            scores[label] = _number(evaluate(turns[label]), "evaluate(model)")
            # It may have called model.train().
            switches.model.eval()
    return scores


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be one number, higher is better, got {value!r}") from error


@dataclass(frozen=True)
class WeightSizes:
    """What the parameters weigh, in bytes.

    Attributes:
        float: In the dtypes that they have.
        quantized: The same with the codes and the float32 scales of quantized weights.
    """

    float: int
    quantized: int


def weight_sizes(model: nn.Module) -> WeightSizes:
    """Count each parameter once; 4-bit codes as packed."""
    own = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    bits = {key: 8 * size for key, size in own.items()}
    for quantizer, weights in weight_quantizers(model).items():
        if not is_active(quantizer):
            continue
        amax = quantizer.amax
        scales = 1 if amax is None else amax.numel()
        for weight in weights:
            if id(weight) in bits:
                bits[id(weight)] = weight.numel() * bits_of(quantizer) + scales * FLOAT_BITS  # type: ignore[arg-type]
    return WeightSizes(sum(own.values()), sum(bits.values()) // 8)
