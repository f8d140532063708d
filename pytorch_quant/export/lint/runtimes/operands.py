"""What the rules of all runtimes ask of an operator: which of its inputs come from a DQ."""

from __future__ import annotations

import numpy as np

from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import source_dq, weight_input
from pytorch_quant.export.lint.operators import CONVOLUTIONS
from pytorch_quant.export.lint.weights import weight_dq

JOINS = ("Add", "Mul", "Concat")
POOLS = ("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean")
RECURRENT = ("LSTM", "GRU")
# Operators that take codes instead of Q/DQ, and their domains.
ON_CODES = {
    "MatMulInteger": "",
    "ConvInteger": "",
    "QLinearMatMul": "",
    "QLinearConv": "",
    "DynamicQuantizeLSTM": "com.microsoft",
}


def judged(graph: Graph) -> list[Node]:
    """Weighted operators, products, pools and joins of two tensors that are no constants."""
    products = set(graph.products())
    return [
        node
        for node in graph.nodes
        if on_codes(node)
        or (
            not node.domain
            and (
                node.op in (*CONVOLUTIONS, *POOLS, *RECURRENT)
                or node in products
                or (node.op in JOINS and len(tensors(graph, node)) > 1)
            )
            and _is_float(graph, node)
            and not _scales_codes(graph, node)
        )
    ]


def on_codes(node: Node) -> bool:
    """Whether the node is an integer operator by itself."""
    return ON_CODES.get(node.op) == node.domain


def _scales_codes(graph: Graph, node: Node) -> bool:
    """Whether a Mul only turns the sums of an integer operator, or a scale, into real units."""
    if node.op != "Mul":
        return False
    made = [graph.producer(name, "Cast", "DynamicQuantizeLinear", "Mul") for name in node.inputs]
    casts = [graph.producer(m.input(0)) for m in made if m is not None and m.op == "Cast"]
    ranged = any(m is not None and m.op == "DynamicQuantizeLinear" for m in made)
    return ranged or any(c is not None and on_codes(c) for c in casts)


def _is_float(graph: Graph, node: Node) -> bool:
    # Shapes are added and joined as well; an unknown type counts.
    constant = all(graph.constant(name) for name in node.inputs if name)
    return not constant and graph.dtype(node.outputs[0]) in (0, 1, 10, 16)


def tensors(graph: Graph, node: Node) -> list[str]:
    """The inputs of a node that are no constants."""
    return [name for name in node.inputs if name and not graph.constant(name)]


def float_operand(graph: Graph, node: Node) -> str | None:
    """Which of the two operands of a product does not come from a DQ, in words; None if both do."""
    weight = weight_input(graph, node)
    names = ["input 0", "input 1"]
    missing = []
    for index in (0, 1):
        if index == weight:
            names[index], names[1 - index] = "its weight", "its data"
            found = weight_dq(graph, node.input(index)) is not None
        else:
            found = source_dq(graph, node.input(index)) is not None
        if not found:
            missing.append(index)
    if not missing:
        return None
    return f"{' and '.join(names[i] for i in missing)} come{'s' * (len(missing) == 1)} from no DQ"


def codes_of(graph: Graph, dq: Node) -> str:
    """The source of the codes that a DQ reads; equal for DQ nodes behind one Q."""
    return dq.input(0)


def zero_point(graph: Graph, node: Node) -> np.ndarray:
    """The zero points of a Q or DQ node."""
    value = graph.value(node.input(2)) if node.input(2) else None
    return np.zeros((), np.int8) if value is None else value
