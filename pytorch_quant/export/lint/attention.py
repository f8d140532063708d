"""Rules L12 and H5: the two matrix products of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pytorch_quant.export.lint.finding import Problem, rule
from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import E4M3, INT8, code_type, moves, source_dq

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_SCORES = ("Mul", "Div", "Add", "Where", "Cast", *("QuantizeLinear", "DequantizeLinear"))


@dataclass(frozen=True)
class Attention:
    """`softmax(q @ k * scale + mask) @ v`.

    Attributes:
        scores: The first product.
        between: The nodes between it and the softmax.
        softmax: The Softmax.
        values: The second product.
        second: Which input of the second product v is.
        keys: The length of the softmax, None where it varies or is unknown.
        head: The size of a head, None likewise.
    """

    scores: Node
    between: tuple[Node, ...]
    softmax: Node
    values: Node
    second: int
    keys: int | None
    head: int | None


def attentions(graph: Graph) -> list[Attention]:
    """All attention patterns of the graph."""
    found = (_attention(graph, node) for node in graph.of("Softmax"))
    return [attention for attention in found if attention is not None]


def in_attention(graph: Graph, node: Node) -> bool:
    """Whether a node is one of the two products of attention."""
    return any(node in (a.scores, a.values) for a in attentions(graph))


def _attention(graph: Graph, softmax: Node) -> Attention | None:
    between: list[Node] = []
    node = graph.producer(softmax.input(0))
    while node is not None and (node.op in _SCORES or (moves(node) and node.op != "MaxPool")):
        between.append(node)
        # The scores are the operand that a product of two activations is behind, the mask is not.
        ways = [n for i in node.inputs if (n := graph.producer(i)) and not graph.constant(i)]
        node = next((n for n in ways if _leads_to_scores(graph, n)), None)
    if node is None or not _is_product(graph, node):
        return None
    probabilities = softmax.outputs[0]
    for _ in range(8):
        # Dropout, Cast and the Q/DQ pair stand between the softmax and the second product.
        readers = graph.consumers(probabilities)
        product = next((n for n in readers if _takes_first(n, probabilities)), None)
        if product is None or not product.outputs:
            return None
        if _is_product(graph, product):
            second = 1 if product.input(0) == probabilities else 0
            sizes = _keys_and_head(graph, node)
            return Attention(node, tuple(between), softmax, product, second, *sizes)
        if product.op not in (_Q, _DQ, "Cast") and not moves(product):
            return None
        probabilities = product.outputs[0]
    return None


def _is_product(graph: Graph, node: Node) -> bool:
    multiplies = node.op == "MatMul" or graph.einsum(node) is not None
    return multiplies and not any(graph.constant(name) for name in node.inputs)


def _takes_first(node: Node, tensor: str) -> bool:
    """Whether a node reads a tensor as its data; of an Einsum, either factor is."""
    return node.input(0) == tensor or (node.op == "Einsum" and tensor in node.inputs)


def _keys_and_head(graph: Graph, scores: Node) -> tuple[int | None, int | None]:
    a, b = (graph.shape(scores.input(i)) for i in (0, 1))
    einsum = graph.einsum(scores)
    if einsum is not None and a and b:
        return einsum.size({einsum.result[-1]}, a, b), einsum.size(einsum.summed, a, b)
    return b[-1] if b else None, a[-1] if a else None


def _leads_to_scores(graph: Graph, node: Node | None) -> bool:
    for _ in range(8):
        if node is None or _is_product(graph, node):
            return node is not None
        if node.op not in _SCORES and not moves(node):
            return False
        used = [name for name in node.inputs if name and not graph.constant(name)]
        node = graph.producer(used[0]) if used else None
    return False


def head_size_reason(code_bits: str, head_size: int | None) -> str | None:
    """Why fused attention does not take a head size, or None.

    Args:
        code_bits: `"int8"` or `"fp8"`.
        head_size: None where it is unknown.
    """
    if head_size is None:
        return None
    if code_bits == "int8" and head_size not in (16, 32, 64):
        return f"its head size is {head_size}; INT8 attention is fused for 16, 32 and 64"
    if code_bits == "fp8" and not 8 < head_size <= 256:
        return f"its head size is {head_size}; FP8 attention is fused above 8 and up to 256"
    return None


def sequence_reason(sequence: int | None) -> str | None:
    """H5: why the products of INT8 attention stay float, or None."""
    if sequence is not None and sequence > 512:
        return f"its sequence has {sequence} entries; INT8 attention is fused up to 512"
    return None


@rule("L12", "performance", title="Attention: Q/DQ on q, k, v and the softmax, none on the mask")
def attention_pairs(graph: Graph) -> Iterator[Problem]:
    """L12, performance (S6, TensorRT #2981 and #3243).

    Where one of the four is quantized, all are. A `Mul` or `Div` by a constant belongs in front of
    the Q or behind the first product; a finding where it stands between the DQ and the product,
    which then runs in float. Behind the product, where the fused kernels have it, it is none.
    """
    for found in attentions(graph):
        first, second = found.scores, found.values
        operands = {
            "q": first.input(0),
            "k": first.input(1),
            "the softmax": second.input(1 - found.second),
            "v": second.input(found.second),
        }
        dqs = {name: source_dq(graph, tensor) for name, tensor in operands.items()}
        scaled = {name: _scaled_dq(graph, tensor) for name, tensor in operands.items()}
        for name, scale in scaled.items():
            if scale is not None:
                yield Problem(
                    scale,
                    f"it stands between the DQ of {name} and the product, which runs in float then",
                    "scale before the quantizer, or behind the product",
                )
        any_quantized = any(dqs.values()) or any(scaled.values())
        for product, names in ((first, ("q", "k")), (second, ("the softmax", "v"))):
            missing = [n for n in names if dqs[n] is None and scaled[n] is None]
            if any_quantized and missing:
                yield Problem(
                    product,
                    f"attention is quantized in part: {' and '.join(missing)} is float",
                    "quantize q, k, v and the softmax: quantize(model, example_inputs=...), or "
                    "disable() the quantizers of this attention",
                )
        for node in found.between:
            on_mask = node.op in ("Add", "Where") and any(
                (dq := graph.producer(name, _DQ)) is not None for name in node.inputs
            )
            if on_mask or node.op == _Q:
                yield Problem(
                    node,
                    "there is a Q/DQ pair between the first product and the softmax",
                    "disable() the quantizer on the mask or the scores",
                )
                break
        dq = dqs["q"]
        kind = {INT8: "int8", E4M3: "fp8"}.get(code_type(graph, dq) if dq else 0, "")
        reason = head_size_reason(kind, found.head)
        if reason and all(dqs.values()):
            yield Problem(first, reason, "leave this attention float: disable() its quantizers")


@rule("H5", "performance", title="INT8 attention has at most 512 entries in its sequence")
def long_sequences(graph: Graph) -> Iterator[Problem]:
    """H5, performance (S6, `find_nodes_from_mha_to_exclude`): the length is that of the keys.

    A finding for each of the two products that is quantized.
    """
    for found in attentions(graph):
        reason = sequence_reason(found.keys)
        for product, index in ((found.scores, 1), (found.values, found.second)):
            dq = source_dq(graph, product.input(index))
            if reason and dq is not None and code_type(graph, dq) == INT8:
                yield Problem(
                    product, reason, "leave this attention float: disable() its quantizers"
                )


def _scaled_dq(graph: Graph, tensor: str) -> Node | None:
    """A Mul or Div by a constant between a DQ and `tensor`."""
    node = graph.producer(tensor)
    while node is not None and moves(node):
        node = graph.producer(node.input(0))
    if node is None or node.op not in ("Mul", "Div"):
        return None
    used = [name for name in node.inputs if not graph.constant(name)]
    return node if len(used) == 1 and source_dq(graph, used[0]) is not None else None
