"""TensorRT's explicit quantization, as its documentation describes it.

Weighted operators run on integers where both operands come from a DQ, whatever follows. Poolings
and joins do where a Q follows as well. Q and DQ move through operators that keep the grid.
(TensorRT documentation, "Working with quantized types", "Explicit quantization".)
"""

from __future__ import annotations

from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import (
    E2M1,
    E4M3,
    INT4,
    INT8,
    code_type,
    grid,
    only_quantized,
    source_dq,
)
from pytorch_quant.export.lint.joins import conv_side
from pytorch_quant.export.lint.operators import CONVOLUTIONS
from pytorch_quant.export.lint.runtimes.operands import POOLS, float_operand, tensors

_TAKEN = (INT8, E4M3, INT4, E2M1)


def verdict(graph: Graph, node: Node) -> tuple[bool, str]:
    """Whether the node runs on 8-bit codes, and why."""
    sources = [dq for dq in (source_dq(graph, name) for name in tensors(graph, node)) if dq]
    foreign = [dq for dq in sources if code_type(graph, dq) not in (*_TAKEN, 0)]
    if foreign:
        return False, f"{foreign[0].name} has codes that TensorRT does not take; see lint_onnx"
    quantized_after = only_quantized(graph, node.outputs[0])
    if node.op in ("MaxPool", "GlobalMaxPool"):
        if sources or quantized_after:
            return True, "it keeps the grid of the DQ before it or the Q behind it"
        return False, "no DQ before it and no Q behind it"
    if node.op in POOLS:
        if sources and quantized_after:
            return True, "DQ before it, Q behind it"
        return False, f"no {'DQ before' if not sources else 'Q behind'} it"
    if node.op == "Concat":
        return _concat(graph, node, sources, quantized_after)
    if node.op in ("Add", "Mul"):
        return _elementwise(graph, node, quantized_after)
    if node.op not in (*CONVOLUTIONS, "Gemm", "MatMul", "Einsum"):
        return False, f"TensorRT runs {node.op} in float"
    missing = float_operand(graph, node)
    if missing:
        return False, missing
    return True, "both operands come from a DQ" + (", Q behind it" if quantized_after else "")


def _concat(
    graph: Graph, node: Node, sources: list[Node], quantized_after: bool
) -> tuple[bool, str]:
    if len(sources) == len(tensors(graph, node)):
        equal = len({grid(graph, dq).scale for dq in sources}) == 1
        return True, "all inputs come from a DQ" + ("" if equal else ", with copies to one scale")
    if quantized_after:
        return True, "the Q behind it moves to its inputs"
    return False, "an input comes from no DQ, and not everything behind it is a Q"


def _elementwise(graph: Graph, node: Node, quantized_after: bool) -> tuple[bool, str]:
    names = tensors(graph, node)
    quantized = [source_dq(graph, name) is not None for name in names]
    if node.op == "Add" and len(names) == 2:
        for side in (0, 1):
            conv = conv_side(graph, names[side]) if quantized[1 - side] else None
            if conv is not None and not quantized[side]:
                return True, f"fused into {conv.name}, the other branch comes from a DQ"
    if all(quantized) and quantized_after:
        return True, "DQ before both inputs, Q behind it"
    if all(quantized):
        return False, "no Q behind it"
    return False, "an input comes from no DQ, and it is no residual of a quantized convolution"
