"""Which layers quantization hurts most."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pytorch_quant.analysis.fisher import FisherSums
from pytorch_quant.analysis.losses import (
    Loss,
    check_loss,
    check_samples,
    loss_of,
    samples_in,
    target_of,
)
from pytorch_quant.analysis.noise import (
    Noise,
    add_outputs,
    check_measured,
    checked_batches,
    in_turn,
)
from pytorch_quant.analysis.ranking import UNITS, LayerSensitivity, Sensitivity
from pytorch_quant.analysis.switches import Switches, switched
from pytorch_quant.batches import Forward, copied

_WHO = "sensitivity"

Names = frozenset[str]


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any] | None,
    evaluate: Callable[[nn.Module], float] | None = None,
    method: str | None = None,
    *,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Rank layers by the harm that quantizing each of them alone does, the worst first.

    Methods, what they score, and what they cost:

    - `sqnr`: SQNR of the output, as in `layer_errors`; no labels; a pass for each layer
    - `loss`: increase of the mean loss; a pass for each layer
    - `fisher`: predicted increase of the loss; one forward and backward pass for all
    - `evaluate`: drop of the score of `evaluate`; one evaluation for each layer

    A negative SQNR is an error above the signal; a negative increase or drop is a gain, most often
    by chance.

    `fisher` is the mean over samples of `1/2 sum((g * e)**2)`: `g` the gradient of the loss of the
    sample and `e` the quantization error at the output of the layer, or at the operands of a call;
    the diagonal of the empirical Fisher matrix stands for the Hessian, as in Li et al., "BRECQ",
    ICLR 2021, equation 10. It takes the loss of a batch as the mean over its samples, which are as
    many as the first tensor of the target, or else of the output, is long. A weight that a call
    reads, such as `F.linear(x, w)`, has one gradient for the whole batch, and scores low.

    The layers are those of `layer_errors`; a disabled quantizer stays off. The model comes back as
    it was, and no gradient is stored in it.

    Args:
        model: Quantized and calibrated.
        batches: Passed to the model as in `calibrate`; for `loss` and `fisher`, pairs of input and
            target. An iterator will do, but not for `exclude(max_drop=...)` with `loss`. None for
            `evaluate`.
        evaluate: `evaluate(model)` gives a score, higher is better. With another method than
            `evaluate` it does not rank, but measures `exclude(max_drop=...)`.
        method: As above; by default `evaluate` where that is given, else `sqnr`.
        loss: `loss(output, target)`, a mean over samples; where batches are no pairs,
            `loss(output, batch)`. By default the cross entropy of `(N, C)` logits.
        forward: `forward(model, batch)` runs one batch and returns the output.
        progress: Show a progress bar.

    Returns:
        The ranking; `exclude(k)` and `exclude(max_drop=...)` make rules of it.

    Raises:
        RuntimeError: uncalibrated quantizers, naming them; a batch on another device.
        TypeError: `model` is no module, `batches` is one tensor or no iterable, a batch cannot be
            passed on, `evaluate` or `loss` cannot be called, or the score is no number.
        ValueError: unknown method, `evaluate` without the function, labels or loss missing, no
            quantizers, none enabled, no batches, no samples in them, no floating-point output, or
            the output, the loss or the score of the float model is NaN or infinite.
        Exception: whatever the model, the batches, `evaluate` and `loss` raise.
    """
    method = _checked_method(method, evaluate, loss)
    if method != "evaluate":
        checked_batches(batches, _WHO)
    with switched(model, forward, _WHO) as switches:
        names = list(switches.sites)
        variants = [frozenset([name]) for name in names]
        everything = frozenset(names)
        reference = total = None
        if method == "sqnr":
            noises = _noises(switches, batches, [*variants, everything], progress)
            *scores, total = [noise.db for noise in noises]
        elif method == "fisher":
            sums = FisherSums(switches, names, loss, _WHO)
            turns = in_turn(batches, _WHO, progress)  # type: ignore[arg-type]
            for number, (batch, done) in enumerate(turns):
                sums.add(batch, number)
                done()
            means = sums.means()
            scores = [means[name] for name in names]
        else:
            wanted = [frozenset(), *variants, everything]
            if method == "loss":
                reference, *values = _losses(switches, batches, wanted, loss, progress)
                scores = [value - reference for value in values]
            else:
                reference, *values = _evaluations(switches, model, evaluate, wanted, progress)
                scores = [reference - value for value in values]
            total = scores.pop()
        rows = _ranked(switches, names, scores, lowest_first=method == "sqnr")
    # What is measured here need not be measured again.
    known: dict[Names, float] = {}
    if reference is not None and total is not None and (method == "evaluate" or evaluate is None):
        sign = -1 if method == "evaluate" else 1
        known = {frozenset(): reference, everything: reference + sign * total}
    measure = _measurement(model, batches, evaluate, method, loss, forward, known)
    return Sensitivity(method, rows, reference, total, measure)


def _checked_method(method: Any, evaluate: Any, loss: Any) -> str:
    if method is None:
        method = "sqnr" if evaluate is None else "evaluate"
    if method not in UNITS:
        near = difflib.get_close_matches(str(method), UNITS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown method {method!r}{hint} Valid: {', '.join(UNITS)}")
    for name, function in (("evaluate", evaluate), ("loss", loss)):
        if function is not None and not callable(function):
            raise TypeError(
                f"{name} must be a function, got {function!r} of type {type(function).__name__}"
            )
    if method == "evaluate" and evaluate is None:
        raise ValueError(
            "method='evaluate' needs evaluate=, a function that takes the model and returns a "
            "score, higher is better"
        )
    return method


def _noises(switches: Switches, batches: Any, variants: list[Names], progress: bool) -> list[Noise]:
    noises = [Noise() for _ in variants]
    turns = in_turn(batches, _WHO, progress, len(variants) + 1)
    for number, (batch, done) in enumerate(turns):
        expected = switches.reference(batch, number)
        done()
        for noise, names in zip(noises, variants, strict=True):
            add_outputs(noise, expected, switches.outputs(batch, names), ", ".join(names))
            done()
    check_measured(noises[-1], _WHO)
    return noises


def _losses(
    switches: Switches, batches: Any, variants: list[Names], loss: Loss | None, progress: bool
) -> list[float]:
    """The mean loss over all samples with each set of sites quantizing."""
    sums, samples = [0.0] * len(variants), 0
    for number, (batch, done) in enumerate(in_turn(batches, _WHO, progress, len(variants))):
        target = target_of(batch, loss, _WHO)
        for i, names in enumerate(variants):
            switches.use(names)
            output = switches.run(batch)
            count = samples_in(target, output)
            if count:
                value = loss_of(output, copied(target), loss, _WHO).double()
                if not names:
                    check_loss(value, number, _WHO)
                sums[i] += count * float(value)
            done()
        samples += count
    check_samples(samples, _WHO)
    return [value / samples for value in sums]


def _evaluations(
    switches: Switches, model: nn.Module, evaluate: Any, variants: list[Names], progress: bool
) -> list[float]:
    scores = []
    for names in tqdm(variants, desc=f"{_WHO} (evaluate)", disable=not progress):
        switches.use(names)
        # Each draws the same random numbers; those of the user come back later.
        torch.manual_seed(0)
        score = evaluate(model)
        try:
            scores.append(float(score))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"evaluate must return one number, higher is better, got {score!r}"
            ) from error
        # Quantized, a score may fall to -inf; a difference needs a finite one in float.
        if math.isnan(scores[-1]) or (not names and math.isinf(scores[-1])):
            quantized = ", ".join(sorted(names)) or "nothing"
            found = "NaN" if math.isnan(scores[-1]) else scores[-1]
            raise ValueError(f"evaluate returned {found} with {quantized} quantized")
        # It may have called model.train().
        switches.model.eval()
    return scores


def _ranked(
    switches: Switches, names: list[str], scores: list[float], lowest_first: bool
) -> list[LayerSensitivity]:
    sign = 1 if lowest_first else -1

    def harm(i: int) -> float:
        # NaN comes from an output that quantization broke.
        return -math.inf if math.isnan(scores[i]) else sign * scores[i]

    order = sorted(range(len(names)), key=harm)
    return [
        LayerSensitivity(
            names[i],
            switches.sites[names[i]].kind,
            scores[i],
            rank,
            tuple(switch.holder.name for switch in switches.all[names[i]]),
        )
        for rank, i in enumerate(order, 1)
    ]


def _measurement(
    model: nn.Module,
    batches: Any,
    evaluate: Any,
    method: str,
    loss: Loss | None,
    forward: Forward | None,
    known: dict[Names, float],
) -> Callable[[Names, bool], float] | None:
    """A function of the sites that quantize, which gives the cost; None where it is predicted."""
    if evaluate is None and method != "loss":
        return None

    def value(names: Names, progress: bool) -> float:
        if names not in known:
            if evaluate is None and isinstance(batches, Iterator):
                raise TypeError(
                    "exclude(max_drop=...) measures the loss again, and the batches were a "
                    f"{type(batches).__name__}, which is empty by now; give sensitivity a list or "
                    "a loader, or use exclude(k)"
                )
            with switched(model, forward, _WHO) as switches:
                if evaluate is None:
                    (known[names],) = _losses(switches, batches, [names], loss, progress)
                else:
                    (known[names],) = _evaluations(switches, model, evaluate, [names], progress)
        return known[names]

    def cost(names: Names, progress: bool) -> float:
        difference = value(names, progress) - value(frozenset(), progress)
        return difference if evaluate is None else -difference

    return cost
