"""Transposes of weights, applied to what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np

from pytorch_quant.export.initializers import clipped_constant, drop_unused
from pytorch_quant.export.wiring import (
    Wiring,
    attribute,
    free_name,
    is_standard,
    names,
    read_instead,
    set_attribute,
)

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"


def fold_weight_transposes(graph: Any) -> int:
    """Apply each Transpose behind the DequantizeLinear of a weight to the weight, in place.

    The axis of per-channel scales moves with it. Runtimes fuse a DequantizeLinear into the product
    that reads it directly, which is rule W2. A weight may be stored as codes, or as float under a
    Q/DQ pair; where something else reads the untransposed values, it is left.

    Args:
        graph: An `onnx.GraphProto`.

    Returns:
        The number of Transpose nodes that are gone.
    """
    folded = 0
    wiring, taken = Wiring(graph), names(graph)
    replaced: dict[str, str] = {}
    gone: list[Any] = []
    for dequantize in [n for n in graph.node if is_standard(n, _DQ)]:
        flips = _transposes(wiring, dequantize.output[0])
        quantize = wiring.producers.get(dequantize.input[0])
        if quantize is not None and not (
            is_standard(quantize, _Q) and wiring.sole_use(quantize.output[0])
        ):
            continue
        pair = [dequantize] if quantize is None else [quantize, dequantize]
        weight = _stored(wiring, pair[0].input[0]) if flips else None
        if weight is None or any(attribute(node, "block_size", 0) for node in pair):
            continue
        rank = len(weight.dims)
        order = list(attribute(flips[0], "perm", range(rank)[::-1]))
        name = free_name(f"{_root(wiring, pair[0].input[0])}_transposed", taken)
        graph.initializer.append(_transposed(weight, order, name))
        pair[0].input[0] = name
        for node in pair:
            if _is_per_channel(wiring, node):
                set_attribute(node, "axis", order.index(attribute(node, "axis", 1) % rank))
        for flip in flips:
            replaced[flip.output[0]] = dequantize.output[0]
        gone += flips
        folded += len(flips)
        shapes = {node.output[0] for node in pair}
        for info in [i for i in graph.value_info if i.name in shapes]:
            graph.value_info.remove(info)
    for node in gone:
        graph.node.remove(node)
    read_instead(graph, replaced)
    if folded:
        drop_unused(graph)
    return folded


def _transposes(wiring: Wiring, tensor: str) -> list[Any]:
    """The readers of `tensor` if all of them are one and the same Transpose."""
    readers = [node for node, _ in wiring.uses(tensor)]
    alike = {
        tuple(attribute(n, "perm", ())) if is_standard(n, "Transpose") else n.op_type
        for n in readers
    }
    kept = wiring.outputs | wiring.captured
    visible = kept & {tensor, *(o for node in readers for o in node.output)}
    if len(alike) != 1 or isinstance(alike.pop(), str) or visible:
        return []
    return readers


def _stored(wiring: Wiring, name: str) -> Any:
    """A constant as an `onnx.TensorProto`, seen through the clip before a narrow grid."""
    import onnx

    kinds = onnx.TensorProto
    held = wiring.held(name)
    if held is None:
        held = clipped_constant(name, wiring.initializers, wiring.producers)
    if held is None or held.data_location == kinds.EXTERNAL:
        return None
    # Two codes share a byte.
    return None if held.data_type in (kinds.INT4, kinds.UINT4) else held


def _root(wiring: Wiring, name: str) -> str:
    while name not in wiring.initializers and wiring.producers[name].input:
        name = next(u for u in wiring.producers[name].input if u in wiring.constants)
    return name


def _transposed(tensor: Any, order: list[int], name: str) -> Any:
    import onnx

    values = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).transpose(order))
    return onnx.TensorProto(
        name=name, data_type=tensor.data_type, dims=values.shape, raw_data=values.tobytes()
    )


def _is_per_channel(wiring: Wiring, node: Any) -> bool:
    scale = wiring.held(node.input[1])
    return scale is not None and len(scale.dims) == 1
