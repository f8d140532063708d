"""One Q/DQ pair for each tensor, however many quantizers with one range stand on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_quant.export.wiring import read_by_bodies


def merge_equal_pairs(graph: Any) -> int:
    """Let quantized consumers of one tensor share its QuantizeLinear and DequantizeLinear.

    Nodes of one kind that read the same tensor with equal scale, zero point and attributes compute
    the same; the first of them serves all. Runtimes fuse a pair into each consumer by itself, but
    run a second pair on the same tensor as a kernel of its own.

    Args:
        graph: An `onnx.GraphProto`, changed in place. Graph outputs keep their names.

    Returns:
        The number of nodes that were dropped.
    """
    content = _content_of(graph)
    outputs = {output.name for output in graph.output}
    outputs.update(*(read_by_bodies(node) for node in graph.node))
    dropped = 0
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        first: dict[Any, str] = {}
        replaced: dict[str, str] = {}
        for node in [n for n in graph.node if n.op_type == kind]:
            made = node.output[0]
            attributes = tuple(sorted(a.SerializeToString() for a in node.attribute))
            key = (node.input[0], *map(content, node.input[1:]), attributes)
            if key not in first or made in outputs:
                first.setdefault(key, made)
                continue
            replaced[made] = first[key]
            graph.node.remove(node)
        for user in graph.node:
            for i, used in enumerate(user.input):
                user.input[i] = replaced.get(used, used)
        dropped += len(replaced)
    gone = {o.name for o in graph.value_info} - {o for node in graph.node for o in node.output}
    for info in [i for i in graph.value_info if i.name in gone]:
        graph.value_info.remove(info)
    return dropped


def _content_of(graph: Any) -> Callable[[str], Any]:
    """What a scale or zero point holds, in place of its name; other names stand as they are."""
    import onnx

    kinds = ("QuantizeLinear", "DequantizeLinear")
    read = {used for node in graph.node if node.op_type in kinds for used in node.input[1:]}
    held: dict[str, Any] = {}
    for constant in (c for c in graph.initializer if c.name in read):
        array = onnx.numpy_helper.to_array(constant)
        held[constant.name] = (constant.data_type, array.shape, array.tobytes())
    return lambda name: held.get(name, name)
