"""Quantizers of calls without weights: residual adds, concatenations, averages, and outputs."""

from __future__ import annotations

from pytorch_quant.dataflow import Call
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.draft import Draft
from pytorch_quant.placement.layers import check_scheme
from pytorch_quant.placement.requantized import (
    AVERAGES,
    CONCATENATIONS,
    PAIRED,
    Readers,
    concatenated,
    paired,
)
from pytorch_quant.placement.residuals import ResidualAdd, find_add, identity_side
from pytorch_quant.placement.rules import Choice


def is_fused_runtime(placement: str) -> bool:
    """Whether a runtime computes an operation in integers where all its tensors have Q/DQ.

    TensorRT decides by itself what it computes in integers between two Q/DQ pairs. ONNX Runtime and
    OpenVINO replace an operation with Q/DQ at its inputs and its output by an integer kernel, and
    compute any other in float.
    """
    return placement in ("onnxruntime", "openvino")


def add_residuals(draft: Draft) -> None:
    """Quantize the operands of residual adds (L4); for ONNX Runtime and OpenVINO both.

    The two may differ in sign. ONNX Runtime turns signed activations into unsigned ones with a
    zero point, so that its integer add takes both; a ReLU in front of signed codes it would keep
    as a float operation of its own, and with it the convolution before.
    """
    for add, choice in draft.residual_adds():
        call = add.call
        if not any(add.convolutions) and not choice.aimed:
            draft.leave(call, "no branch of the add ends in a quantized convolution (L8)")
            continue
        if add.broadcast and not choice.aimed:
            draft.leave(call, "the operands of the add differ in shape (L8)")
            continue
        sides = _sides(draft, add, choice)
        if not sides:
            draft.leave(call, "another reader keeps the convolution from being fused (L4)")
            continue
        partner = next((draft.input_descriptor(c) for c in add.convolutions if c), None)
        descriptor = draft.partner_descriptor(choice, partner)
        if descriptor is None:
            draft.leave(call, "its scheme has no static activations")
            continue
        for index in sides:
            path, value = add.sides[index]
            reason = "identity of a residual add (L4)" if len(sides) == 1 else "operand of an add"
            draft.take(call, path, draft.tracing.root(value), descriptor, reason)


def _sides(draft: Draft, add: ResidualAdd, choice: Choice) -> list[int]:
    if is_fused_runtime(draft.placement):
        return [0, 1]
    side = identity_side(add, draft.tracing, draft.products)
    if side is not None:
        return [side]
    return [0, 1] if choice.aimed else []


def add_requantized(draft: Draft) -> Readers:
    """Quantize what is quantized again behind it: concatenations, averages, pairs (L6, L8).

    From the last call to the first, because what comes first depends on what follows.
    """
    readers = Readers(draft.tracing, draft.taken)
    kinds = CONCATENATIONS | AVERAGES | PAIRED
    planned = {call.index: layer for call, layer in draft.calls(*kinds)}
    for call in reversed(draft.flow.calls):
        for value in call.outputs:
            readers.settle(value)
        if call.index not in planned or not call.outputs:
            continue
        if call.op in CONCATENATIONS:
            _add_concatenation(draft, readers, call)
        elif call.op in PAIRED:
            _add_pair(draft, readers, call)
        else:
            _add_average(draft, readers, call)
    return readers


def _requantized_descriptor(
    draft: Draft, readers: Readers, call: Call, why: str
) -> QuantDescriptor | None:
    """The descriptor of a call whose result is quantized again; None if it stays float."""
    choice = draft.choice(call)
    found = readers.settled[call.outputs[0]]
    if choice.scheme is None:
        draft.leave(call, "a rule")
        return None
    check_scheme(draft.site(call), call.op, choice, draft.placement)
    if not choice.aimed:
        if found is None:
            draft.leave(call, f"a float operation reads its result, or the model returns it {why}")
            return None
        if len(found) != 1:
            unread = "nothing that could be quantized reads its result"
            draft.leave(call, f"{'readers quantize it in several ways' if found else unread} {why}")
            return None
    partner = next(iter(found)) if found and len(found) == 1 else None
    descriptor = draft.partner_descriptor(choice, partner)
    if descriptor is None:
        draft.leave(call, "its scheme has no static activations")
    elif draft.is_uneven(call):
        return None
    return descriptor


def _add_concatenation(draft: Draft, readers: Readers, call: Call) -> None:
    tensors = concatenated(call, draft.tracing)
    if not tensors or draft.had_quantizer(call, list(tensors.values())):
        return
    descriptor = _requantized_descriptor(draft, readers, call, "(L6)")
    if descriptor is None:
        return
    keys = [draft.tracing.root(value) for value in tensors.values()]
    for (path, _), key in zip(tensors.items(), keys, strict=True):
        draft.take(call, path, key, descriptor, "one scale for a concatenation (L6)")
    reached = readers.reached(call.outputs[0], descriptor)
    for key in [*keys[1:], *map(draft.tracing.root, reached)]:
        draft.joined.append((keys[0], key))


def _add_pair(draft: Draft, readers: Readers, call: Call) -> None:
    """Both factors of a product, or both terms of a sum that no convolution is fused with (L8)."""
    sides = paired(call, draft.tracing)
    taken = call.index in draft.taken
    if not sides or taken or draft.had_quantizer(call, list(sides.values())):
        return
    add = find_add(call, draft.tracing, draft.products)
    if add is not None and identity_side(add, draft.tracing, draft.products) is not None:
        return
    descriptor = _requantized_descriptor(draft, readers, call, "(L8)")
    if descriptor is None:
        return
    draft.left.pop(draft.site(call), None)
    for path, value in sides.items():
        draft.take(call, path, draft.tracing.root(value), descriptor, "its result is int8 (L8)")


def _add_average(draft: Draft, readers: Readers, call: Call) -> None:
    layer = draft.layers.get(call.module)
    tensor = draft.average(call, layer)
    if tensor is None:
        return
    if is_fused_runtime(draft.placement) and _comes_from_integers(draft, tensor[1]):
        # The kernel exists, and the output gets its quantizer below.
        choice = draft.choice(call)
        if choice.scheme is not None and readers.settled[call.outputs[0]] is None:
            _take_average(draft, call, tensor, draft.partner_descriptor(choice, None))
            return
    _take_average(draft, call, tensor, _requantized_descriptor(draft, readers, call, "(L8)"))


def _take_average(
    draft: Draft, call: Call, tensor: tuple, descriptor: QuantDescriptor | None
) -> None:
    if descriptor is None:
        return
    named = "input" if call.module in draft.layers else ""
    key = draft.tracing.root(tensor[1])
    draft.take(call, tensor[0], key, descriptor, "in front of an average pooling (L8)", named)


def _comes_from_integers(draft: Draft, value: int) -> bool:
    call = draft.flow.producer(value)
    while call is not None and call.inputs:
        if draft.products.get(call.index) or (call.op == "add" and call.index in draft.taken):
            return True
        folded = call.op in ("batch_norm", "clamp")
        if not folded and not draft.tracing.passed_on(call, call.inputs[0]):
            return False
        call = draft.flow.producer(call.inputs[0])
    return False
