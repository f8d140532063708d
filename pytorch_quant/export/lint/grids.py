"""Q/DQ nodes as quantizers: their grid, and the way from an operator to its DQ."""

from __future__ import annotations

from dataclasses import dataclass

from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.operators import GRID_PRESERVING

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"

# onnx.TensorProto numbers; the module does not import onnx.
FLOAT, UINT8, INT8, INT32, FLOAT16, BFLOAT16 = 1, 2, 3, 6, 10, 16
E4M3, UINT4, INT4, E2M1, E8M0, UINT2, INT2 = 17, 21, 22, 23, 24, 25, 26
WEIGHT_ONLY = (INT4, UINT4, E2M1, INT2, UINT2)
_BOUNDS = {INT8: 127.0, UINT8: 255.0, E4M3: 448.0, INT4: 7.0, UINT4: 15.0, E2M1: 6.0}


@dataclass(frozen=True)
class Grid:
    """What has to agree where two tensors share one grid.

    Attributes:
        scale: The scales, in real units per step; the tensor's name where they are unknown.
        dtype: The type of the codes.
        axis: The channel axis, None per tensor.
    """

    scale: tuple[float, ...] | str
    dtype: int
    axis: int | None


def code_type(graph: Graph, node: Node) -> int:
    """The type of the codes of a Q or DQ node; UINT8 where ONNX defaults to it."""
    if node.op == _DQ:
        known = graph.dtype(node.input(0))
        if known:
            return known
        source = graph.producer(node.input(0), _Q)
        return code_type(graph, source) if source else graph.dtype(node.input(2))
    declared = graph.dtype(node.input(2)) if node.input(2) else node.attrs.get("output_dtype", 0)
    value = graph.value(node.input(2)) if node.input(2) and not declared else None
    if value is not None:
        return {"int8": INT8, "uint8": UINT8}.get(str(value.dtype), 0)
    return int(declared) or (0 if node.input(2) else UINT8)


def bound(dtype: int) -> float:
    """The largest code, to which `amax` maps."""
    return _BOUNDS.get(dtype, 127.0)


def scale_count(graph: Graph, node: Node) -> int | None:
    """How many scales a Q or DQ node has, None if unknown."""
    count = graph.entries(node.input(1))
    value = graph.value(node.input(1)) if count is None else None
    return count if value is None else int(value.size)


def grid(graph: Graph, node: Node) -> Grid:
    """The grid of a Q or DQ node."""
    value = graph.value(node.input(1))
    scale = node.input(1) if value is None else tuple(value.astype(float).reshape(-1).tolist())
    per_channel = scale_count(graph, node) not in (None, 1)
    axis = int(node.attrs.get("axis", 1)) if per_channel else None
    rank = len(graph.shape(node.input(0)) or ())
    if axis is not None and axis < 0 and rank:
        axis += rank
    return Grid(scale, code_type(graph, node), axis)


def dqs_of(graph: Graph, q: Node) -> list[Node]:
    """The DQ nodes that read the codes of a Q node."""
    return [n for n in graph.consumers(q.outputs[0]) if n.op == _DQ]


def qs_on(graph: Graph, tensor: str) -> list[Node]:
    """The Q nodes that quantize `tensor`."""
    return [n for n, i in graph.uses(tensor) if n.op == _Q and i == 0]


def source_dq(graph: Graph, tensor: str) -> Node | None:
    """The DQ that `tensor` comes from, directly or through operators that keep its grid.

    A Concat counts where all its inputs come from a DQ. A Cast is looked through: R9 and W2 judge
    it.
    """
    node = graph.producer(tensor)
    while node is not None and node.op != _DQ:
        if node.op == "Concat":
            found = [source_dq(graph, name) for name in node.inputs]
            return found[0] if all(found) else None
        if not moves(node) and node.op != "Cast":
            return None
        node = graph.producer(node.input(0))
    return node


def reads_fp8(graph: Graph, node: Node) -> bool:
    """Whether an input of the node comes from FP8 codes."""
    dqs = [source_dq(graph, name) for name in node.inputs if name]
    return any(dq is not None and code_type(graph, dq) == E4M3 for dq in dqs)


def moves(node: Node) -> bool:
    """Whether the node keeps the grid of its first input."""
    if node.op == "Resize":
        return node.attrs.get("mode", b"nearest") in (b"nearest", "nearest")
    return node.op in GRID_PRESERVING


def weight_input(graph: Graph, node: Node) -> int | None:
    """The index of the constant operand of a weighted operator, None for two activations."""
    constants = [i for i in (1, 0) if graph.constant(node.input(i))]
    return constants[0] if len(constants) == 1 else None


def endpoints(graph: Graph, tensor: str) -> list[Node | None]:
    """Who reads `tensor` behind operators that keep its grid; None is a graph output."""
    found: list[Node | None] = []
    pending, seen = [tensor], set()
    while pending:
        name = pending.pop(0)
        if name in seen:
            continue
        seen.add(name)
        if name in graph.outputs:
            found.append(None)
        for node, index in graph.uses(name):
            if moves(node) and index == 0:
                pending.extend(node.outputs[:1] if node.op != "Split" else node.outputs)
            else:
                found.append(node)
    return found


def only_quantized(graph: Graph, tensor: str) -> bool:
    """Whether everything that reads `tensor` quantizes it, so that it is int8 in the engine."""
    ends = endpoints(graph, tensor)
    return bool(ends) and all(end is not None and end.op == _Q for end in ends)
