"""Rules W1 to W7: weights and biases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pytorch_quant.export.lint.finding import Problem, rule
from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import (
    E4M3,
    INT4,
    INT8,
    INT32,
    UINT4,
    UINT8,
    scale_count,
    source_dq,
    weight_input,
)
from pytorch_quant.export.lint.operators import WEIGHTED

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"


def weight_chain(graph: Graph, tensor: str) -> tuple[Node | None, list[Node]]:
    """The DQ that a constant operand comes from, and the nodes between it and the operator."""
    between = []
    node = graph.producer(tensor)
    while node is not None and node.op != _DQ:
        between.append(node)
        sources = [graph.producer(name) for name in node.inputs]
        node = next((n for n in sources if n is not None and n.op != "Constant"), None)
    return node, between


def weight_dq(graph: Graph, tensor: str) -> Node | None:
    """The DQ that a constant operand comes from, whatever stands between (W2 judges that)."""
    return weight_chain(graph, tensor)[0]


def weighted(graph: Graph) -> Iterator[tuple[Node, int]]:
    """The weighted operators that have a constant weight, and the index of that input."""
    for node in graph.of(*WEIGHTED):
        index = weight_input(graph, node)
        if index is not None:
            yield node, index


def folded_weight(graph: Graph, tensor: str) -> bool:
    """Whether a float constant lies on an int8 grid, as a folded Q/DQ pair leaves it.

    Its largest magnitude is then the code 127 or 128, and all others are whole codes.
    """
    w = graph.value(tensor)
    if w is None or w.dtype.kind != "f" or w.size < 16 or w.ndim < 2:
        return False
    x = w.astype(np.float64)
    for axis in (None, 0, 1, w.ndim - 1):
        kept = tuple(a for a in range(w.ndim) if a != axis)
        amax = np.abs(x).max(axis=kept if axis is not None else None, keepdims=True)
        for code in (127, 128):
            q = x / np.where(amax > 0, amax, 1.0) * code
            # float32 products are off by some 1e-5 steps; a random weight is by a quarter.
            if np.abs(q - np.round(q)).max() < 2e-3 and np.unique(np.round(q)).size > 2:
                return True
    return False


@rule("W1", "error", title="Weights are float -> Q -> DQ, or integer codes -> DQ")
def weight_path(graph: Graph) -> Iterator[Problem]:
    """W1, error (S1, S7).

    A finding where codes reach the operator without a DQ, as by a Cast and a Mul. The clip in front
    of the Q of a narrow grid is computed from constants and folded by every runtime.
    """
    for node, index in weighted(graph):
        dq, between = weight_chain(graph, node.input(index))
        roots = [node.input(index), *(name for n in between for name in n.inputs)]
        codes = [r for r in roots if graph.dtype(r) in (INT8, UINT8, E4M3, INT4, UINT4)]
        if dq is None and between and codes:
            yield Problem(
                node,
                f"its weight is computed from the codes {codes[0]} by {between[0].op}, not by a DQ",
                'export with export_onnx, which writes codes with a DQ, or weights="float"',
            )


@rule("W2", "error", "warning", title="The DQ of a weight feeds its operator directly")
def weight_directly(graph: Graph) -> Iterator[Problem]:
    """W2, error; warning for a lone Transpose (S6)."""
    for node, index in weighted(graph):
        dq, between = weight_chain(graph, node.input(index))
        if dq is None or not between:
            continue
        kinds = [n.op for n in reversed(between)]
        yield Problem(
            node,
            f"{' and '.join(kinds)} stands between {dq.name} and this weight",
            "store the weight as the operator reads it: transpose the codes in front of the DQ",
            "warning" if kinds == ["Transpose"] else None,
        )


def weight_axes(node: Node, index: int, rank: int) -> int | None:
    """The output channels of a weight; None where it has to be per tensor."""
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1 if node.attrs.get("group", 1) == 1 else None
    if node.op == "Gemm" and index == 1:
        return 0 if node.attrs.get("transB", 0) else 1
    if node.op == "Gemm":
        return 1 if node.attrs.get("transA", 0) else 0
    return rank - 1 if index == 1 else rank - 2


@rule("W3", "error", title="Weights are per channel along the output channels, or per tensor")
def weight_axis(graph: Graph) -> Iterator[Problem]:
    """W3, error (S1, S4, S7).

    ConvTranspose has axis 1 in one group and per-tensor weights in several; versions of the
    original toolkit used axis 0 there. Per-tensor weights are fine everywhere. An axis that is
    missing is R8.
    """
    for node, index in weighted(graph):
        dq, between = weight_chain(graph, node.input(index))
        shape = graph.shape(node.input(index))
        if dq is None or shape is None or "block_size" in dq.attrs:
            continue
        scales = graph.shape(dq.input(1))
        if scales is None or len(scales) != 1 or scales[0] in (None, 1) or "axis" not in dq.attrs:
            continue
        axis = int(dq.attrs["axis"]) % max(1, len(shape))
        for n in reversed(between):
            if n.op == "Transpose":
                perm = list(n.attrs.get("perm", range(len(shape))[::-1]))
                axis = perm.index(axis)
        expected = weight_axes(node, index, len(shape))
        if axis != expected:
            grain = "per tensor" if expected is None else f"axis {expected}"
            yield Problem(
                node,
                f"{dq.name} is per channel along axis {axis}; {node.op} takes {grain}",
                "give the _weight_quantizer that axis: quant_desc_weight=QuantDescriptor(axis=...)",
            )


@rule("W4", "error", title="Activations are per tensor")
def activation_scales(graph: Graph) -> Iterator[Problem]:
    """W4, error (S1). Block scales of dynamic formats are no Q of this kind."""
    for q in graph.of(_Q):
        count = scale_count(graph, q)
        if count is not None and count > 1 and not graph.constant(q.input(0)):
            yield Problem(
                q,
                f"it quantizes an activation with {count} scales",
                "use a per-tensor descriptor: quant_desc_input=QuantDescriptor(axis=None)",
            )


@rule("W5", "error", title="Biases are float")
def biases(graph: Graph) -> Iterator[Problem]:
    """W5, error (onnxruntime #14229, onnx-tensorrt #850): no Q/DQ on a bias, no INT32 codes."""
    fix = "disable() the quantizer of this bias; runtimes quantize it themselves"
    seen = set()
    for node in graph.of("Conv", "ConvTranspose", "Gemm"):
        dq = graph.producer(node.input(2), _DQ)
        if dq is not None:
            seen.add(dq.name)
            yield Problem(node, f"its bias comes from {dq.name}", fix)
    for dq in graph.of(_DQ):
        if graph.dtype(dq.input(0)) == INT32 and dq.name not in seen:
            yield Problem(dq, "it dequantizes INT32 codes", fix)


@rule("W6", "error", title="An all-zero weight channel has a positive scale")
def zero_channels(graph: Graph) -> Iterator[Problem]:
    """W6, error (S6). Other scales that are not positive are R3."""
    for node in graph.quantizers():
        value = graph.value(node.input(1)) if graph.constant(node.input(0)) else None
        if value is not None and bool((value == 0).any()):
            yield Problem(
                node,
                f"{int((value == 0).sum())} of its {value.size} scales are 0",
                "export with export_onnx, which gives a channel of zeros the largest scale",
            )


@rule("W7", "warning", title="The Q/DQ pair of a weight was not folded to float")
def folded(graph: Graph) -> Iterator[Problem]:
    """W7, warning (S7): the data is quantized and the float weight lies on an int8 grid."""
    for node, index in weighted(graph):
        if weight_dq(graph, node.input(index)) is not None:
            continue
        if source_dq(graph, node.input(1 - index)) is None:
            continue
        if folded_weight(graph, node.input(index)):
            yield Problem(
                node,
                "its float weight lies on an int8 grid: an optimizer folded its Q/DQ pair, and the "
                "layer runs in float",
                "export with export_onnx, and run no constant folding on the file",
            )
