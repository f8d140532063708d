"""A scheme for each layer under a budget."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pytorch_quant.analysis.bit_problem import BitProblem
from pytorch_quant.analysis.bit_search import BitSearch, choice_names
from pytorch_quant.analysis.costs import arguments_of, counting_macs
from pytorch_quant.analysis.fisher import FisherSums
from pytorch_quant.analysis.losses import Loss
from pytorch_quant.analysis.noise import Noise, add_outputs, check_measured
from pytorch_quant.analysis.switches import Switches, switched
from pytorch_quant.batches import Forward, call_model, copied
from pytorch_quant.improve.layers import repeatable
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.placement.layers import Layer, check_scheme, find_layers
from pytorch_quant.placement.rules import Choice
from pytorch_quant.plain_pass import plain_forward
from pytorch_quant.ptq import calibrate
from pytorch_quant.quantization import placement_plan, quantize
from pytorch_quant.scheme import FP8, INT4, INT8, PRESETS, Scheme

_WHO = "search_bits"
_BUDGETS = ("size", "bops", "error")
_METHODS = ("sqnr", "fisher")


def search_bits(
    model: nn.Module,
    batches: Iterable[Any],
    budget: float | Mapping[str, float],
    choices: Sequence[Scheme | str | None] = (INT4, INT8, FP8, None),
    *,
    method: str = "sqnr",
    minimize: str = "size",
    rules: Mapping[Any, Any] | None = None,
    placement: str = "tensorrt",
    calibration: str = "max",
    loss: Loss | None = None,
    forward: Forward | None = None,
    points: int = 12,
    progress: bool = True,
) -> BitSearch:
    """Choose a scheme for each convolution and linear layer of a float model, under a budget.

    For each choice a copy of the model is quantized with it and calibrated, and the error of each
    layer is measured with this layer alone quantized. Errors of layers are taken to add up, as they
    do while they are small and independent; measure the result. An integer programme
    (`scipy.optimize.milp`) then finds the assignment with the least sum, exactly.

    A layer that the placement leaves float is not assigned, nor are calls between layers, which
    follow the placement; their error is not in the prediction. Sizes count weights as packed codes
    with a float32 scale for each amax, all else as it is; a runtime may store 4-bit codes in bytes.
    Layers that share a weight get one choice; a weight that is read elsewhere too, such as by an
    embedding, stays beside its codes.
    Bit operations are MACs x bits of the weight x bits of the activation (van Baalen et al.,
    "Bayesian Bits", NeurIPS 2020), 32 bits for float, for the first batch.

    The model is not changed.

    Args:
        model: A float model, as for `quantize`.
        batches: To calibrate and to measure on, as in `calibrate`; run through several times. For
            `fisher` pairs of input and target.
        budget: `{"size": ..., "bops": ..., "error": ...}`, one or more, all are kept; a number
            alone is a size. Sizes in bytes and bit operations; up to 1 as a share of the float
            model. `error` as the method measures it.
        choices: Schemes or their names, None for float. One that a layer cannot take is left out
            for it.
        method: `sqnr`: the noise of the output as a share of its power. `fisher`: the predicted
            increase of the loss, see `sensitivity`; one backward pass for all layers.
        minimize: What to make least under an `error` budget alone: `size` or `bops`. With another
            budget it is the error.
        rules: Rules for the rest, as in `quantize`. What they leave float stays so.
        placement: As in `quantize`.
        calibration: The method of `calibrate`.
        loss: For `fisher`, as in `sensitivity`.
        forward: `forward(model, batch)` runs one batch and returns the output.
        points: The most points of the front, at least 1.
        progress: Show progress bars.

    Returns:
        The rules, what they are predicted to cost, and the predicted front.

    Raises:
        RuntimeError: as for `quantize` and `calibrate`.
        TypeError: `model` is no module, `batches` can be run through only once or is no iterable,
            `budget`, a choice or `points` is of a wrong type.
        ValueError: the model has quantizers already, no layer to assign, no choice that a layer
            can take, a budget that cannot be met (the error names the least), an unknown name, no
            batches or points, NaN or Inf in them or in what the float model makes of them, or
            labels or a loss missing for `fisher`.
        Exception: whatever the model, the batches and `loss` raise.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHO} takes a module, got {type(model).__name__}")
    schemes = _checked_choices(choices)
    limits = _checked_budget(budget)
    _check_names(method, minimize)
    if isinstance(points, bool) or not isinstance(points, Integral):
        raise TypeError(f"points must be a whole number, got {points!r}")
    if points < 1:
        raise ValueError(f"points={points} is out of range; use 1 or more")
    repeatable(batches, _WHO)
    if named_quantizers(model):
        raise ValueError(
            f"{_WHO} starts from a float model, and this one has quantizers; pass the model as it "
            "was before quantize()"
        )
    with torch.random.fork_rng():
        first = next(iter(batches), None)
    if first is None:
        raise ValueError(f"{_WHO}: no batches to measure on; the loader is empty")
    run = forward or call_model
    found = find_layers(dict(model.named_modules()))
    found = {name: layer for name, layer in found.items() if layer.group == "weighted"}
    with plain_forward(model), counting_macs(found) as macs:
        example = arguments_of(model, lambda: run(model, copied(first)))
    layers = _assigned(model, found, example, rules, placement)
    fitting = {name: _fitting(layer, schemes, placement) for name, layer in layers.items()}
    errors: dict[str, dict[int, float]] = {name: {} for name in layers}
    for index, scheme in enumerate(tqdm(schemes, desc=_WHO, disable=not progress)):
        names = [name for name in layers if index in fitting[name]]
        if scheme is None:
            measured = dict.fromkeys(names, 0.0)
        else:
            chosen = {**(rules or {}), **dict.fromkeys(names, scheme)}
            # A copy that is made of inference tensors has no gradients.
            with torch.random.fork_rng(), torch.inference_mode(False):
                trial = quantize(
                    copy.deepcopy(model),
                    chosen,
                    example_inputs=copied(example),
                    placement=placement,
                )
                calibrate(trial, batches, calibration, forward=forward, progress=False)
                measured = _measure(trial, batches, names, method, loss, forward)
        for name, error in measured.items():
            if math.isfinite(error):
                errors[name][index] = error
    problem = BitProblem(model, layers, macs, errors, schemes)
    return problem.solve(limits, method, minimize, points, rules or {})


def _checked_choices(choices: Any) -> list[Scheme | None]:
    if isinstance(choices, (str, Scheme)) or not isinstance(choices, Sequence) or not choices:
        raise TypeError(f"choices must be a sequence of Schemes, names or None, got {choices!r}")
    found: list[Scheme | None] = []
    for choice in choices:
        if isinstance(choice, str):
            if choice not in PRESETS:
                near = difflib.get_close_matches(choice.upper(), PRESETS, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown choice {choice!r}; {hint}Valid: {', '.join(PRESETS)}")
            choice = PRESETS[choice]
        if choice is not None and not isinstance(choice, Scheme):
            raise TypeError(f"a choice is a Scheme, a name or None, got {choice!r}")
        if choice is not None and PRESETS.get(choice.name, choice) != choice:
            # Results write schemes as names, which quantize reads as presets.
            raise ValueError(
                f"the choice {choice!r} has the name of another scheme, the preset "
                f"{choice.name}; give it a name of its own"
            )
        if choice not in found:
            found.append(choice)
    names = choice_names(found)
    if len(set(names)) < len(names):
        raise ValueError(f"two choices have one name: {', '.join(names)}; rename one")
    return found


def _checked_budget(budget: Any) -> dict[str, float]:
    limits = budget if isinstance(budget, Mapping) else {"size": budget}
    if not limits:
        raise ValueError(f"the budget is empty; give one of {', '.join(_BUDGETS)}")
    for key, value in limits.items():
        if key not in _BUDGETS:
            near = difflib.get_close_matches(str(key), _BUDGETS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown budget {key!r}; {hint}Valid: {', '.join(_BUDGETS)}")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"budget {key!r} must be a number, got {value!r}")
        value = float(value)
        if not (math.isfinite(value) and (value > 0 or (key == "error" and value == 0))):
            raise ValueError(f"budget {key!r} must be above 0, got {value!r}")
    return dict(limits)


def _check_names(method: str, minimize: str) -> None:
    if method not in _METHODS:
        near = difflib.get_close_matches(str(method), _METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown method {method!r}{hint} Valid: {', '.join(_METHODS)}")
    if minimize not in ("size", "bops"):
        raise ValueError(f"minimize must be 'size' or 'bops', got {minimize!r}")


def _assigned(
    model: nn.Module, found: dict[str, Layer], example: Any, rules: Any, placement: str
) -> dict[str, Layer]:
    inputs = None if placement == "none" else copied(example)
    with torch.random.fork_rng():
        plan = placement_plan(model, inputs, rules, placement)
    quantized = {place.module for q in plan.quantizers for place in q.places if place.call is None}
    layers = {name: layer for name, layer in found.items() if name in quantized}
    if not layers:
        raise ValueError(
            f"{_WHO}: the model has no convolution or linear layer that "
            f"placement={placement!r} would quantize; print(placement_plan(model, example)) says "
            "why"
        )
    return layers


def _fitting(layer: Layer, schemes: list[Scheme | None], placement: str) -> list[int]:
    """The numbers of the schemes that a layer can take."""
    fits, reasons = [], []
    summed = layer.weight_axes()[2]
    for index, scheme in enumerate(schemes):
        try:
            choice = Choice(scheme, "exact", aimed=True)
            check_scheme(layer.name, layer.op, choice, placement, summed)
            fits.append(index)
        except ValueError as error:
            reasons.append(str(error))
    if not fits:
        raise ValueError(f"{_WHO}: no choice fits {layer.name}: {'; '.join(reasons)}; add None")
    return fits


def _measure(
    trial: nn.Module,
    batches: Iterable[Any],
    names: list[str],
    method: str,
    loss: Loss | None,
    forward: Forward | None,
) -> dict[str, float]:
    """The error of the output, or of the loss, with each of the layers alone quantized."""
    if not names:
        return {}
    with switched(trial, forward, _WHO) as switches:
        # A layer that the placement left float with this scheme did not get it.
        names = [name for name in names if name in switches.sites]
        if method == "fisher":
            sums = FisherSums(switches, names, loss, _WHO)
            for number, batch in enumerate(batches):
                sums.add(batch, number)
            return sums.means()
        return _output_noise(switches, batches, names)


def _output_noise(switches: Switches, batches: Iterable[Any], names: list[str]) -> dict[str, float]:
    noises = {name: Noise() for name in names}
    total = Noise()
    for number, batch in enumerate(batches):
        expected = switches.reference(batch, number)
        add_outputs(total, expected, expected, "")
        for name, noise in noises.items():
            add_outputs(noise, expected, switches.outputs(batch, [name]), name)
    check_measured(total, _WHO)
    return {name: noise.ratio for name, noise in noises.items()}
