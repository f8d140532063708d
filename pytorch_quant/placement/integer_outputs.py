"""Quantizers at outputs, for runtimes that replace operations with Q/DQ on all sides.

L2 is TensorRT's rule, not theirs. A convolution, an add, an average or a concatenation is computed
in integers only where its output is quantized too. Most outputs are, by the operation that reads
them; the others get a quantizer after the batch norm and the ReLU or clamp that such runtimes fuse.
Linear layers and products need none: their integer kernels may return float.
"""

from __future__ import annotations

from pytorch_quant.dataflow import Call
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.draft import Draft
from pytorch_quant.placement.plan import Operand, Place
from pytorch_quant.placement.requantized import Readers
from pytorch_quant.placement.sharing import Use

RESULT: Operand = ("result",)

_REASONS = {"conv": "output of a convolution", "add": "output of an add"}


def output_uses(draft: Draft, readers: Readers) -> list[Use]:
    """The quantizers of outputs that would leave the integers."""
    uses: list[Use] = []
    for call in draft.flow.calls:
        descriptor = _descriptor(draft, call)
        if descriptor is None or not call.outputs:
            continue
        last = _fused_end(draft, call)
        value = last.outputs[0]
        pooled = draft.placement == "openvino" and _is_pooled(draft, call, value)
        settled = readers.settled.get(value) is not None and not pooled
        if settled or not readers.is_read(value):
            continue
        if "#" not in last.site:
            continue
        place = Place(last.module, last.site.rpartition("/")[2], RESULT)
        reason = f"{_REASONS.get(call.op, f'output of {call.op}')}, which a float operation reads"
        if pooled:
            reason = f"{_REASONS.get(call.op, f'output of {call.op}')} in front of a MaxPool"
        if draft.tracing.returned(value):
            reason = f"{_REASONS.get(call.op, f'output of {call.op}')} and of the model"
        key = draft.tracing.root(value)
        order = last.index, len(draft.uses) + len(uses)
        uses.append(Use(place, key, descriptor, last.op, reason, last.run, order))
    return uses


def _is_pooled(draft: Draft, call: Call, value: int) -> bool:
    # Others move Q up through a MaxPool; OpenVINO runs one in float that has none in front of it.
    if call.op not in _REASONS:
        # Averages and concatenations hand on the grid of their inputs.
        return False
    return any(reader.op == "max_pool" for reader in draft.tracing.readers(value))


def without_requantization(
    draft: Draft, readers: Readers, uses: list[Use], outputs: list[Use]
) -> list[Use]:
    """Drop the uses of tensors that are quantized where they are made: once is enough (L10)."""
    made = {(use.key, use.descriptor) for use in outputs}
    for use in outputs:
        last = next(call for call in draft.flow.calls if call.index == use.order[0])
        for value in readers.reached(last.outputs[0], use.descriptor):
            made.add((draft.tracing.root(value), use.descriptor))
    return [use for use in uses if (use.key, use.descriptor) not in made] + outputs


def _descriptor(draft: Draft, call: Call) -> QuantDescriptor | None:
    """The static descriptor of the activations of an operation that is computed in integers."""
    taken = draft.taken.get(call.index, {})
    if call.op == "conv" and draft.products.get(call.index):
        found = draft.input_descriptor(call)
    elif call.op in ("add", "cat", "stack", "avg_pool", "adaptive_avg_pool", "mean"):
        found = next(iter(taken.values()), None)
    else:
        return None
    return None if found is None or found.dynamic else found


def _fused_end(draft: Draft, call: Call) -> Call:
    fused = ["batch_norm"] * (call.op == "conv") + ["relu", "clamp"]
    while True:
        reader = draft.tracing.only_reader(call.outputs[0])
        if reader is None or reader.op not in fused or not reader.outputs:
            return call
        fused = fused[1:] if reader.op == "batch_norm" else []
        call = reader
