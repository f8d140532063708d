"""`make_plan`: where quantizers go in a built model, decided before anything is edited.

What is quantized:

- each layer with a weight, its input and its weight; one that the pass did not reach too;
- functional convolutions, linear layers and matrix products, also those inside of modules that are
  no plain layers, such as attention (L12);
- for TensorRT the identity of each residual add, the inputs of concatenations and of averages
  whose result is quantized again (L4, L6, L8), and no outputs (L2);
- for ONNX Runtime and OpenVINO, which get the same placement, both operands of such adds, and
  outputs too, so that each operation has Q/DQ on all its sides. A product `x * gate` of two
  activations stays float.

One tensor has one quantizer (L5), shared by all readers that quantize it alike. Operations without
a weight and without a rule take the descriptor of the product next to them.

A rule that names a call, a function or the type of a layer also places quantizers where the rules
of the runtime would not: at both operands of an add, at all inputs of a concatenation. A rule that
reaches a call otherwise, by a glob or by a module around it, decides how it is quantized, not
whether.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pytorch_quant.dataflow import Dataflow
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.draft import Draft
from pytorch_quant.placement.float_layers import reason_to_leave
from pytorch_quant.placement.frame_counts import expected, framed
from pytorch_quant.placement.integer_outputs import output_uses, without_requantization
from pytorch_quant.placement.layers import (
    PATCHED,
    Layer,
    check_scheme,
    find_layers,
    is_scripted,
    weight_descriptor,
)
from pytorch_quant.placement.plan import LeftFloat, Place, Plan, PlannedQuantizer
from pytorch_quant.placement.rules import BoundRules, Rules
from pytorch_quant.placement.sharing import Key, Use, in_agreement, share
from pytorch_quant.placement.signs import Signs
from pytorch_quant.placement.structure import add_requantized, add_residuals, is_fused_runtime

PLACEMENTS = ("none", "tensorrt", "onnxruntime", "openvino")
"""The runtimes whose placements are known; `"none"` quantizes layers and no calls."""


def check_placement(placement: str) -> None:
    """Raise for a placement that is not known.

    Raises:
        ValueError: with the name that was probably meant.
    """
    if placement not in PLACEMENTS:
        near = difflib.get_close_matches(str(placement), PLACEMENTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown placement {placement!r}{hint} Valid: {', '.join(PLACEMENTS)}")


def make_plan(
    model: nn.Module, flow: Dataflow | None, rules: Mapping[Any, Any] | None, placement: str
) -> Plan:
    """Plan the quantizers of a model; edits nothing.

    Args:
        model: The model.
        flow: A recorded pass of it; not needed for `"none"`.
        rules: See `pytorch_quant.placement.rules`.
        placement: `"tensorrt"`, `"onnxruntime"`, `"openvino"`, or `"none"`: the layers that
            `quant_modules.initialize` replaces, each with quantizers of its own.

    Returns:
        The plan. It depends on the sizes of the example, but not on its batch size.

    Raises:
        TypeError: rules of the wrong type.
        ValueError: an unknown placement; one that needs a pass without it; a rule that fits
            nothing; a scheme that a layer cannot take.
    """
    checked = Rules(rules)
    check_placement(placement)
    if placement == "none":
        return _plan_of_layers(model, checked)
    if flow is None:
        raise ValueError(
            f"placement={placement!r} follows the tensors of a forward pass: give example inputs, "
            "or use placement='none'"
        )
    draft = Draft(model, flow, checked, placement)
    signs = Signs(draft.tracing)
    draft.add_products()
    add_residuals(draft)
    readers = add_requantized(draft)
    outputs = output_uses(draft, readers) if is_fused_runtime(placement) else []
    uses = _agreed(draft, [*draft.uses, *outputs])
    if outputs:
        results = set(outputs)
        others = [use for use in uses if use not in results]
        made = [use for use in uses if use in results]
        uses = without_requantization(draft, readers, others, made)
    uses += _beside_the_pass(draft)
    return _finished(draft, uses, signs)


def _agreed(draft: Draft, uses: list[Use]) -> list[Use]:
    runs: dict[str, set[int]] = {name: set(by_run) for name, by_run in draft.counts.items()}
    kept, odd = in_agreement(uses, runs)
    for call in draft.flow.calls:
        site = draft.site(call)
        if site in odd:
            reason = "not every run of its module would quantize it"
            draft.left[site] = LeftFloat(site, call.op, reason)
    return kept


def _beside_the_pass(draft: Draft) -> list[Use]:
    """Layers that made no call of their own: not reached, or recurrent, or quantized on request."""
    uses: list[Use] = []
    ran = {name: index for index, name in reversed(list(enumerate(draft.flow.runs)))}
    read = {value.parameter for value in draft.flow.values if value.parameter}
    end = len(draft.flow.calls)
    for position, layer in enumerate(draft.layers.values()):
        weight = f"{layer.name}.weight" if layer.name else "weight"
        called_elsewhere = layer.group == "weighted" and weight in read
        if (layer.name in ran and layer.group in ("weighted", "average")) or called_elsewhere:
            continue
        choice = draft.rules.choice(layer.name, layer.op)
        why = None
        if choice.scheme is None:
            why = "a rule"
        elif layer.group == "recurrent" and not choice.explicit:
            why = "a recurrent layer; quantized, it is a loop over time: a rule asks for that (L15)"
        elif layer.group == "average" and not choice.aimed:
            why = "the example inputs do not reach it"
        elif draft.placement == "tensorrt":
            why = reason_to_leave(layer.size_of(), choice)
        if layer.group == "on request" and not choice.aimed:
            continue
        if why is not None:
            draft.left.setdefault(layer.name, LeftFloat(layer.name, layer.op, why))
            continue
        reached = layer.name in ran
        calls = [call.index for call in draft.flow.calls if call.module == layer.name]
        order = calls[0] if calls else end + position
        reason = "of its own" if reached else "of its own: the example inputs do not reach it"
        entered: Key | None = None
        if layer.group == "on request" and calls:
            entered = draft.tracing.root(draft.flow.calls[calls[0]].inputs[0])
        uses += _own_uses(layer, draft.rules, draft.placement, order, reason, entered)
    return uses


def _own_uses(
    layer: Layer,
    rules: BoundRules,
    placement: str,
    order: int,
    reason: str,
    entered: Key | None = None,
) -> list[Use]:
    """An input quantizer for a layer alone, and one for its weight."""
    choice = rules.choice(layer.name, layer.op)
    scheme = choice.scheme
    assert scheme is not None
    found = []
    summed = None
    if layer.has_weight:
        output_axis, summed_axis, summed = layer.weight_axes()
        found.append(("weight", weight_descriptor(scheme, output_axis, summed_axis)))
    check_scheme(layer.name, layer.op, choice, placement, summed)
    found.insert(0, ("input", scheme.input))
    uses = []
    for rank, (operand, descriptor) in enumerate(found):
        if descriptor is not None:
            place, key = Place(layer.name, None, (operand,)), entered
            if key is None or operand == "weight":
                key = operand, layer.name
            what = f"{operand} {reason}"
            uses.append(Use(place, key, descriptor, layer.op, what, 0, (order, rank)))
    return uses


def _finished(draft: Draft, uses: list[Use], signs: Signs) -> Plan:
    if is_fused_runtime(draft.placement):
        for use in uses:
            # Integer products of an unsigned second factor with a signed first one do not exist.
            if use.op in ("matmul", "einsum") and use.place.operand[0] != 0:
                signs.need_sign(use.key)
    for one, other in draft.joined:
        signs.agree(one, other)
    everything = {use.key for use in uses}

    def signless(keys: Iterable[Key], descriptor: QuantDescriptor) -> bool:
        if not is_fused_runtime(draft.placement) or descriptor.dynamic:
            return False
        if isinstance(descriptor.num_bits, tuple):
            return False
        return signs.unsigned(set(keys), everything)

    quantizers = share(uses, draft.joined, signless)
    kept = {place.site for quantizer in quantizers for place in quantizer.places}
    left = [entry for site, entry in draft.left.items() if site not in kept]
    left += _idle_rules(draft.rules)
    places = [place for quantizer in quantizers for place in quantizer.places]
    counts = expected(draft.counts, places)
    ran = set(draft.flow.runs)
    unreached = [name for name in draft.flow.modules if name not in ran]
    return Plan(
        draft.placement,
        quantizers,
        _in_run_order(draft, left),
        counts,
        framed(draft.flow, draft.counts, counts, unreached),
    )


def _in_run_order(draft: Draft, left: list[LeftFloat]) -> list[LeftFloat]:
    position: dict[str, int] = {}
    for call in draft.flow.calls:
        position.setdefault(draft.site(call), call.index)
    return sorted(left, key=lambda entry: position.get(entry.site, len(draft.flow.calls)))


def _idle_rules(rules: BoundRules) -> list[LeftFloat]:
    # A recipe serves many models, so that a type that one of them lacks is no error.
    names = [getattr(key, "__name__", str(key)) for key in rules.idle]
    return [LeftFloat(name, "rule", "nothing in the model fits this rule") for name in names]


def _plan_of_layers(model: nn.Module, rules: Rules) -> Plan:
    modules = dict(model.named_modules())
    layers = find_layers(modules)
    bound = rules.bind(modules, {name: layer.op for name, layer in layers.items()})
    uses: list[Use] = []
    left: list[LeftFloat] = []
    for order, layer in enumerate(layers.values()):
        choice = bound.choice(layer.name, layer.op)
        if layer.op not in PATCHED and not (choice.aimed or layer.group == "recurrent"):
            continue
        if choice.scheme is None:
            left.append(LeftFloat(layer.name, layer.op, "a rule"))
        elif layer.op in PATCHED or choice.explicit:
            uses += _own_uses(layer, bound, "none", order, "of its own")
        else:
            left.append(LeftFloat(layer.name, layer.op, "a recurrent layer without a rule"))
    left += [
        LeftFloat(name, "script", "a scripted module is compiled; nothing can be placed in it")
        for name, module in modules.items()
        if is_scripted(module) and not (name and is_scripted(modules[name.rpartition(".")[0]]))
    ]
    quantizers: list[PlannedQuantizer] = share(uses, [], lambda keys, descriptor: False)
    return Plan("none", quantizers, [*left, *_idle_rules(bound)])
