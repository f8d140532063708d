"""Parameters by name, groups of them for an optimizer, and weights replaced by quantized ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.nn.tensor_quantizer import TensorQuantizer


def match_parameters(
    model: nn.Module, patterns: Sequence[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters whose qualified name matches a pattern, each once, in the model's order.

    Args:
        model: Any module.
        patterns: Regular expressions, searched anywhere in the name (`re.search`).

    Returns:
        A generator of names and parameters.

    Raises:
        TypeError: `patterns` is not a list of patterns.
        re.error: a pattern is no regular expression.
    """
    compiled = _compiled(patterns, "patterns must be list of patterns")
    return (
        (name, parameter)
        for name, parameter in model.named_parameters()
        if any(pattern.search(name) for pattern in compiled)
    )


def group_parameters(
    model: nn.Module,
    patterns_list: Sequence[Sequence[str]],
    lrs: Sequence[float] | None = None,
    momentums: Sequence[float] | None = None,
    weight_decays: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `torch.optim`, one for each list of patterns and one for the rest.

    Every parameter of the model is in exactly one group: the first whose patterns match its name,
    else the last group, which may be empty and takes the defaults of the optimizer.

    Args:
        model: Any module.
        patterns_list: For each group, regular expressions as in `match_parameters`.
        lrs: The learning rate of each group but the last.
        momentums: The momentum of each group but the last.
        weight_decays: The weight decay of each group but the last.

    Returns:
        `len(patterns_list) + 1` groups, with the keys `params`, and `lr`, `momentum` and
        `weight_decay` where they are given.

    Raises:
        TypeError: `patterns_list` is not a list of lists of patterns (`must be list of list of
            patterns`), or another list has not its length (`must match`).
        re.error: a pattern is no regular expression.
    """
    problem = "patterns_list must be list of list of patterns"
    if not isinstance(patterns_list, (list, tuple)):
        raise TypeError(f"{problem}, got {patterns_list!r}")
    compiled = [_compiled(patterns, problem) for patterns in patterns_list]
    settings = {"lr": lrs, "momentum": momentums, "weight_decay": weight_decays}
    groups: list[dict[str, Any]] = [{"params": []} for _ in range(len(compiled) + 1)]
    for key, values in settings.items():
        if values is None:
            continue
        if not isinstance(values, (list, tuple)) or len(values) != len(compiled):
            raise TypeError(
                f"the length of {key}s must match that of patterns_list ({len(compiled)}), got "
                f"{values!r}"
            )
        for group, value in zip(groups[:-1], values, strict=True):
            group[key] = value
    for name, parameter in model.named_parameters():
        fits = (i for i, group in enumerate(compiled) if any(p.search(name) for p in group))
        groups[next(fits, -1)]["params"].append(parameter)
    return groups


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Set `requires_grad=False`, in place, on the parameters whose name matches a pattern.

    Args:
        model: Any module.
        patterns: Regular expressions as in `match_parameters`.

    Raises:
        TypeError: `patterns` is not a list of patterns.
        re.error: a pattern is no regular expression.
    """
    for _, parameter in match_parameters(model, patterns):
        parameter.requires_grad = False


def quant_weight_inplace(model: nn.Module) -> None:
    """Replace each weight of `model` by its fake-quantized value, in place.

    The weight quantizers are disabled afterwards, and lose their pre-quantization scale, which the
    weights then hold. Those that are disabled or do not quantize are left, with their weights.

    Args:
        model: Holds layers with weight quantizers.

    Raises:
        ValueError: a weight quantizer gives integer codes, or its layer has no parameter that
            holds what it quantizes. No weight has been changed then.
    """
    found: dict[TensorQuantizer, list[list[Tensor]]] = {}
    for name, layer in model.named_modules():
        for quantizer, parameters in _stored_weights(layer):
            if not quantizer.quantizes:
                continue
            what = f"{name + '.' if name else ''}_weight_quantizer"
            if not quantizer.fake_quant:
                raise ValueError(f"{what} gives integer codes; only fake quantization fits here")
            if not parameters:
                raise ValueError(
                    f"{what}: {type(layer).__name__} has no parameter that it quantizes; give the "
                    "layer a `weight`, or disable() the quantizer"
                )
            found.setdefault(quantizer, []).append(parameters)
    with torch.no_grad():
        for quantizer, stored in found.items():
            for parameters in stored:
                whole = torch.cat(parameters, 1) if len(parameters) > 1 else parameters[0]
                y = quantizer(whole)
                widths = [p.shape[1] for p in parameters] if len(parameters) > 1 else []
                parts = y.split(widths, 1) if widths else [y]
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.copy_(part)
    # Last, because layers may share a quantizer.
    for quantizer in found:
        quantizer.disable()
        quantizer.pre_quant_scale = None


def _stored_weights(layer: Any) -> Iterator[tuple[TensorQuantizer, list[Tensor]]]:
    """Each weight quantizer of a layer with the parameters that it sees side by side."""
    if isinstance(layer, nn.RNNBase):
        for quantizer, weights in zip(
            getattr(layer, "_weight_quantizers", []), layer.all_weights, strict=False
        ):
            yield quantizer, list(weights[:2])
        return
    quantizer = getattr(layer, "_weight_quantizer", None)
    if isinstance(quantizer, TensorQuantizer):
        if isinstance(layer, nn.RNNCellBase):
            yield quantizer, [layer.weight_ih, layer.weight_hh]
        else:
            weight = getattr(layer, "weight", None)
            yield quantizer, [weight] if isinstance(weight, Tensor) else []


def _compiled(patterns: Any, problem: str) -> list[re.Pattern[str]]:
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, (str, re.Pattern)) for pattern in patterns
    ):
        raise TypeError(f"{problem}, got {patterns!r}")
    return [re.compile(pattern) for pattern in patterns]
