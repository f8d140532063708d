"""ONNX Runtime on x86: which groups DQ -> operator -> Q its optimizer replaces.

Written from the behaviour of the node group selectors of ONNX Runtime's QDQ optimizer, and checked
against the graphs that it saves. Before them it moves Q and DQ through operators that keep the
grid, drops Relu and Clip that the range of a Q implies, and turns int8 into uint8 where one Q has
one DQ with one reader. Codes of one group have one type, and convolutions and products take uint8.
"""

from __future__ import annotations

from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import E4M3, INT8, INT32, UINT8, code_type, grid, weight_input
from pytorch_quant.export.lint.runtimes.operands import (
    RECURRENT,
    float_operand,
    on_codes,
    zero_point,
)

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_MOVED = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
_UNARY = ("AveragePool", "GlobalAveragePool")
_BOUNDS = {INT8: (-128, 127), UINT8: (0, 255)}
_SIGNED = "its codes are int8 and read more than once; fix_onnx(target='onnxruntime') makes uint8"
_NO_Q = "its result goes to no single Q"


def verdict(graph: Graph, node: Node) -> tuple[bool, str]:
    """Whether the node runs on 8-bit codes, and why."""
    if on_codes(node):
        return True, "an operator on codes"
    if E4M3 in (input_type(graph, name) for name in node.inputs if name):
        return False, "ONNX Runtime has no kernel for FP8 codes; Q, DQ and operator run one by one"
    if node.op == "Conv":
        return _conv(graph, node)
    if node.op in ("MatMul", "Gemm"):
        return _product(graph, node)
    if node.op in (*_UNARY, "Add", "Mul", "Concat"):
        return _group(graph, node)
    if node.op == "MaxPool":
        return _max_pool(graph, node)
    kernel = "none for Q/DQ" if node.op in RECURRENT else "no integer kernel"
    return False, f"ONNX Runtime has {kernel} {node.op}".replace("kernel ", "kernel for ")


def input_type(graph: Graph, tensor: str, moved: bool = False) -> int | None:
    """The type of the codes that a reader of `tensor` gets; None if they come from no DQ.

    Args:
        graph: The graph.
        tensor: What is read.
        moved: Whether an operator is inserted in front of the reader, such as a Reshape.
    """
    node, path = graph.producer(tensor), 0
    while node is not None and node.op in _MOVED:
        tensor, path = node.input(0), path + 1
        node = graph.producer(tensor)
    if node is None or node.op != _DQ:
        return None
    kind = code_type(graph, node)
    if kind != INT8 or graph.constant(node.input(0)):
        return kind
    alone = path or moved or (graph.sole_consumer(tensor) and graph.sole_consumer(node.input(0)))
    return UINT8 if alone else INT8


def output_q(graph: Graph, tensor: str) -> tuple[Node, int] | None:
    """The one Q that `tensor` goes to, and the type of its codes; None if there is no such Q."""
    clips: list[Node] = []
    moved = False
    while graph.sole_consumer(tensor):
        node, index = graph.uses(tensor)[0]
        if node.op == _Q and index == 0:
            if not all(_implied(graph, clip, node) for clip in clips):
                return None
            kind = code_type(graph, node)
            dqs = graph.consumers(node.outputs[0])
            single = len(dqs) == 1 and graph.sole_consumer(dqs[0].outputs[0])
            return node, UINT8 if kind == INT8 and (moved or single) else kind
        if index != 0 or node.op not in (*_MOVED, "Relu", "Clip"):
            return None
        if node.op in ("Relu", "Clip"):
            clips.append(node)
        moved |= node.op in _MOVED
        tensor = node.outputs[0]
    return None


def _implied(graph: Graph, clip: Node, q: Node) -> bool:
    """Whether the range of `q` cuts off what a Relu or Clip does."""
    low_code, high_code = _BOUNDS.get(code_type(graph, q), (0, 0))
    scale = graph.value(q.input(1))
    if scale is None or scale.size != 1:
        return False
    zero = int(zero_point(graph, q).reshape(-1)[0])
    if clip.op == "Relu":
        return low_code == zero
    bounds = [graph.value(clip.input(i)) if clip.input(i) else None for i in (1, 2)]
    step = float(scale.reshape(()))
    low, high = (float(code - zero) * step for code in (low_code, high_code))
    tolerance = step * 1e-3
    below = bounds[0] is None or float(bounds[0].reshape(())) <= low + tolerance
    return below and (bounds[1] is None or float(bounds[1].reshape(())) >= high - tolerance)


def _conv(graph: Graph, node: Node) -> tuple[bool, str]:
    missing = float_operand(graph, node)
    if missing:
        return False, missing
    data = input_type(graph, node.input(0))
    if data is None or input_type(graph, node.input(1)) is None:
        return False, "something stands between a DQ and it"
    out = output_q(graph, node.outputs[0])
    if out is None:
        return False, _why_no_q(graph, node)
    if data == INT8:
        return False, _SIGNED
    return _one_type(out[1], [data])


def _why_no_q(graph: Graph, node: Node) -> str:
    tensor = node.outputs[0]
    users = graph.consumers(tensor)
    if graph.sole_consumer(tensor) and users[0].op == "BatchNormalization":
        return "a batch norm that is not folded stands behind it"
    if graph.sole_consumer(tensor) and users[0].op in ("Relu", "Clip"):
        return f"{users[0].op} stands between it and a Q whose zero point does not imply it"
    return _NO_Q


def _one_type(out: int, kinds: list[int]) -> tuple[bool, str]:
    if set(kinds) != {out}:
        return False, f"its codes are of different types; {_SIGNED.partition('; ')[2]}"
    return True, "DQ on all inputs, Q behind it"


def _product(graph: Graph, node: Node) -> tuple[bool, str]:
    missing = float_operand(graph, node)
    if missing:
        return False, missing
    add = _bias_add(graph, node)
    rank = len(graph.shape(node.input(0)) or ())
    # MatMul and Add become Reshape, Gemm, Reshape where there are more than two dimensions.
    moved = add is not None and rank > 2
    kinds = [input_type(graph, node.input(0), moved), input_type(graph, node.input(1))]
    if kinds[0] is None or kinds[1] is None:
        return False, "something stands between a DQ and it"
    if weight_input(graph, node) is None and kinds[1] == INT8 and kinds[0] != INT8:
        kinds[1] = INT8
    result = (add or node).outputs[0]
    out = output_q(graph, result)
    if out is not None and moved:
        out = (out[0], UINT8 if out[1] == INT8 else out[1])
    if kinds[0] == INT8 and ((node.op == "MatMul" and add is None) or kinds[1] != INT8):
        return False, _SIGNED
    bias = _bias(graph, node, add)
    if bias == "float" and out is None:
        return False, "its bias is float and its result goes to no single Q"
    if out is None:
        if any(n.op == _Q for n in graph.consumers(result)):
            return False, _NO_Q
        return True, "DQ on all inputs, float result"
    return _one_type(out[1], [kinds[0]])


def float_for_its_bias(graph: Graph) -> list[tuple[Node, str]]:
    """The Adds of float biases for which a quantized MatMul becomes a Gemm in float.

    Each comes with the name of the bias; only those of three or more dimensions.
    """
    found = []
    for node in graph.of("MatMul"):
        add = _bias_add(graph, node)
        rank = len(graph.shape(node.input(0)) or ())
        if add is None or rank < 3 or float_operand(graph, node):
            continue
        if _bias(graph, node, add) == "float" and output_q(graph, add.outputs[0]) is None:
            found.append((add, _bias_name(node, add)))
    return found


def gemms_float_for_their_bias(graph: Graph) -> list[Node]:
    """The quantized Gemms that run in float for their float bias and their float result."""
    return [
        node
        for node in graph.of("Gemm")
        if not float_operand(graph, node)
        and _bias(graph, node, None) == "float"
        and output_q(graph, node.outputs[0]) is None
    ]


def _bias_add(graph: Graph, node: Node) -> Node | None:
    """The Add behind a MatMul that ONNX Runtime makes a Gemm of both."""
    if node.op != "MatMul" or not graph.sole_consumer(node.outputs[0]):
        return None
    add = graph.consumers(node.outputs[0])[0]
    shape = graph.shape(node.input(1))
    if add.op != "Add" or shape is None or len(shape) != 2:
        return None
    other = _bias_name(node, add)
    bias = graph.shape(other)
    fits = bias is not None and (bias == shape[1:] or bias == (1, *shape[1:]))
    return add if fits and graph.constant(other) else None


def _bias(graph: Graph, node: Node, add: Node | None) -> str:
    name = _bias_name(node, add)
    if not name:
        return "none"
    dq = graph.producer(name, _DQ)
    return "codes" if dq is not None and graph.dtype(dq.input(0)) == INT32 else "float"


def _bias_name(node: Node, add: Node | None) -> str:
    if add is not None:
        return add.input(1) if add.input(0) == node.outputs[0] else add.input(0)
    return node.input(2) if node.op == "Gemm" else ""


def _group(graph: Graph, node: Node) -> tuple[bool, str]:
    names = [name for name in node.inputs if name]
    kinds = [input_type(graph, name) for name in names]
    for name, kind in zip(names, kinds, strict=True):
        if kind is None:
            return False, f"{name} comes from no DQ"
    out = output_q(graph, node.outputs[0])
    if out is None:
        return False, _why_no_q(graph, node)
    return _one_type(out[1], [kind for kind in kinds if kind is not None])


def _max_pool(graph: Graph, node: Node) -> tuple[bool, str]:
    kind, out = input_type(graph, node.input(0)), output_q(graph, node.outputs[0])
    if kind is None and out is None:
        return False, "no DQ before it and no single Q behind it"
    if kind is None or out is None:
        q_or_dq = "Q behind" if kind is None else "DQ before"
        if out is not None and code_type(graph, out[0]) == INT8 and not _single(graph, out[0]):
            return False, _SIGNED
        return True, f"the {q_or_dq} it moves through it"
    dq = graph.producer(node.input(0), _DQ)
    if dq is not None and grid(graph, dq).scale != grid(graph, out[0]).scale:
        return False, "the scales before and behind it differ"
    return _one_type(out[1], [kind])


def _single(graph: Graph, q: Node) -> bool:
    dqs = graph.consumers(q.outputs[0])
    return len(dqs) == 1 and graph.sole_consumer(dqs[0].outputs[0])
