"""Rules L1, L2, L5, L7, L9, L10, L11: where Q/DQ pairs stand along one chain of operators."""

from __future__ import annotations

from collections.abc import Iterator

from pytorch_quant.export.lint.attention import in_attention
from pytorch_quant.export.lint.finding import Problem, rule
from pytorch_quant.export.lint.float_layers import is_rgb_conv
from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import (
    E4M3,
    WEIGHT_ONLY,
    code_type,
    dqs_of,
    endpoints,
    grid,
    moves,
    only_quantized,
    qs_on,
    source_dq,
    weight_input,
)
from pytorch_quant.export.lint.operators import (
    CONVOLUTIONS,
    FLOAT_BY_DEFAULT,
    NORMS_AND_CLIPS,
    QUANTIZABLE,
    WEIGHTED,
)
from pytorch_quant.export.lint.weights import folded_weight, weight_dq
from pytorch_quant.export.targets import TARGETS

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"


@rule(
    "L1",
    "performance",
    "error",
    title="Data and weight of an operator both come from a DQ, or neither",
    targets=TARGETS,
)
def both_operands(graph: Graph) -> Iterator[Problem]:
    """L1, performance or error (S1, S5).

    An error where the weight is quantized and the data is not, which some TensorRT 8 builds refuse;
    performance where the data alone is quantized, and where one of two activations is, which run in
    float. Weight-only INT4 and FP4 are meant. A float weight that still lies on an int8 grid is W7,
    the products of attention are L12.
    """
    products = set(graph.products())
    for node in graph.nodes:
        if node.op not in CONVOLUTIONS and node not in products:
            continue
        weight = weight_input(graph, node)
        if weight is None:
            sides = [source_dq(graph, node.input(i)) is not None for i in (0, 1)]
            constants = any(graph.constant(node.input(i)) for i in (0, 1))
            if sides[0] != sides[1] and not constants and not in_attention(graph, node):
                yield Problem(
                    node,
                    f"input {sides.index(True)} comes from a DQ and input {sides.index(False)} is "
                    "float, so it runs in float",
                    "quantize both operands (QuantMatMul), or disable() the quantizer of the one",
                )
            continue
        data = source_dq(graph, node.input(1 - weight))
        stored = weight_dq(graph, node.input(weight))
        if data is not None and stored is None:
            if graph.target == "tensorrt" and folded_weight(graph, node.input(weight)):
                continue
            yield Problem(
                node,
                "its data comes from a DQ and its weight is float, so it runs in float",
                "enable the _weight_quantizer of this layer, or disable() its _input_quantizer",
            )
        elif data is None and stored is not None:
            weight_only = code_type(graph, stored) in WEIGHT_ONLY or "block_size" in stored.attrs
            if not weight_only:
                yield Problem(
                    node,
                    "its weight comes from a DQ and its data is float",
                    "enable the _input_quantizer of this layer, or disable() its _weight_quantizer",
                    "error",
                )


def weighted_source(graph: Graph, tensor: str) -> Node | None:
    """The Conv, Gemm or MatMul that `tensor` comes from through norms and clips."""
    node = graph.producer(tensor)
    while node is not None and node.op in NORMS_AND_CLIPS:
        node = graph.producer(node.input(0))
    if node is not None and node.op == "Add":
        # The bias of a linear layer on more than two dimensions is an Add of its own.
        sides = [name for name in node.inputs if not graph.constant(name)]
        node = graph.producer(sides[0], "MatMul") if len(sides) == 1 else None
    return node if node is not None and node.op in WEIGHTED else None


@rule("L2", "performance", title="No Q/DQ behind a weighted operator that nothing quantized needs")
def after_weighted(graph: Graph) -> Iterator[Problem]:
    """L2, performance (S1, S5).

    Two cases: a pair between Conv, BatchNormalization and ReLU, which keeps them from being fused,
    and a pair on the result of a weighted operator that only float operators read. A pair on a
    graph output is L9, one in front of an operator of L11 is L11.
    """
    for q in graph.of(_Q):
        behind = [n for dq in dqs_of(graph, q) for n in graph.consumers(dq.outputs[0])]
        source = graph.producer(q.input(0), *CONVOLUTIONS, "BatchNormalization")
        split = [n for n in behind if n.op in NORMS_AND_CLIPS]
        if split and source is not None and weighted_source(graph, q.input(0)) is not None:
            yield Problem(
                q,
                f"it stands between {source.name} and {split[0].name}, which can then not be fused",
                f"quantize behind {split[0].op} instead: disable() this quantizer",
            )
            continue
        ends = [e for dq in dqs_of(graph, q) for e in endpoints(graph, dq.outputs[0])]
        if not ends or weighted_source(graph, q.input(0)) is None:
            continue
        if any(e is None or e.op in QUANTIZABLE or e.op in (_Q, *FLOAT_BY_DEFAULT) for e in ends):
            continue
        readers = ", ".join(sorted({e.op for e in ends if e is not None}))
        yield Problem(
            q,
            f"it quantizes the result of a weighted operator for {readers}, which is float",
            "disable() this quantizer: outputs are quantized by the layer that reads them",
        )


@rule("L5", "performance", title="One tensor has one Q/DQ pair, shared by all its readers")
def one_pair(graph: Graph) -> Iterator[Problem]:
    """L5, performance (S1, S5).

    Pairs of different scales count as well: the tensor is then written twice. Several DQ nodes
    behind one Q are the same codes and no finding.
    """
    tensors = dict.fromkeys(q.input(0) for q in graph.of(_Q))
    for tensor in tensors:
        if not tensor or graph.constant(tensor):
            continue
        first, *others = qs_on(graph, tensor)
        for other in others:
            same = grid(graph, first) == grid(graph, other)
            how = "the same scale" if same else "another scale"
            yield Problem(
                other,
                f"{tensor} already has {first.name}, and this is a second Q with {how}",
                "let both layers use one quantizer, as quantize(model, example_inputs=...) does",
            )


@rule("L7", "performance", title="Operators that keep the grid get no Q/DQ of their own")
def own_pair(graph: Graph) -> Iterator[Problem]:
    """L7, performance (S1, S6).

    A finding where a pair serves such an operator alone and its result is quantized again. The
    pair in front of a Relu behind Conv or BatchNormalization is L2.
    """
    for dq in graph.of(_DQ):
        q = graph.producer(dq.input(0), _Q)
        readers = graph.consumers(dq.outputs[0])
        if q is None or len(dqs_of(graph, q)) != 1 or not graph.sole_consumer(dq.outputs[0]):
            continue
        node = readers[0]
        if not moves(node) or not only_quantized(graph, dq.outputs[0]):
            continue
        if node.op == "Relu" and graph.producer(q.input(0), *CONVOLUTIONS, "BatchNormalization"):
            continue
        yield Problem(
            node,
            f"{q.name} quantizes for this {node.op} alone, and its result is quantized again; it "
            "keeps the grid and needs no pair of its own",
            f"disable() the quantizer in front of this {node.op}",
        )


@rule("L9", "performance", title="No Q/DQ on graph outputs, none on RGB input for FP8")
def ends_of_the_graph(graph: Graph) -> Iterator[Problem]:
    """L9, performance (S6, S7).

    Whether a first layer is sensitive cannot be seen in a file; the sensitivity analysis tells.
    """
    for output in graph.outputs:
        node = graph.producer(output)
        while node is not None and moves(node):
            node = graph.producer(node.input(0))
        if node is not None and node.op == _DQ and not graph.constant(output):
            yield Problem(
                node,
                f"it dequantizes the graph output {output}, which only loses precision",
                "disable() the quantizer on this output",
            )
    for node in graph.of("Conv"):
        dq = source_dq(graph, node.input(0))
        if dq is not None and is_rgb_conv(graph, node) and code_type(graph, dq) == E4M3:
            yield Problem(
                node,
                "the first convolution reads an image of 3 channels or fewer in FP8",
                "leave the first convolution float: quantize(model, {its name: None})",
            )


@rule("L10", "performance", title="No DQ whose result goes straight into a Q", targets=TARGETS)
def requantized(graph: Graph) -> Iterator[Problem]:
    """L10, performance (S1): redundant with an equal grid, a requantization with another."""
    for q in graph.of(_Q):
        dq = graph.producer(q.input(0), _DQ)
        if dq is None:
            continue
        if grid(graph, dq) == grid(graph, q):
            message = f"{dq.name} goes straight into it with the same scale; the pair does nothing"
            fix = "disable() one of the two quantizers"
        else:
            message = f"{dq.name} goes straight into it with another scale or type: a requantizing "
            message += "kernel that costs accuracy"
            fix = "let both layers use one quantizer"
        yield Problem(q, message, fix)


@rule("L11", "performance", title="Softmax, LayerNorm, GELU, SiLU, Exp and Div stay float")
def float_by_default(graph: Graph) -> Iterator[Problem]:
    """L11, performance (S6).

    A LayerNormalization behind a convolution may be quantized, which S6 does; that it is not, is no
    finding, because the file runs as well.
    """
    for dq in graph.of(_DQ):
        if graph.constant(dq.outputs[0]) or in_attention_scores(graph, dq):
            continue
        readers = graph.consumers(dq.outputs[0])
        named = [n for n in readers if n.op in FLOAT_BY_DEFAULT]
        gates = [n for n in readers if n.op == "Mul" and _gates_itself(graph, n, named)]
        if not named or len(named) + len(gates) < len(readers):
            continue
        q = graph.producer(dq.input(0), _Q)
        source = weighted_source(graph, q.input(0)) if q is not None else None
        if source is not None and source.op in CONVOLUTIONS:
            named = [n for n in named if n.op != "LayerNormalization"]
        if named:
            yield Problem(
                q or dq,
                f"it quantizes for {named[0].name}, and {named[0].op} runs in float",
                "disable() this quantizer",
            )


def _gates_itself(graph: Graph, node: Node, activations: list[Node]) -> bool:
    outputs = {o for activation in activations for o in activation.outputs}
    return any(name in outputs for name in node.inputs)


def in_attention_scores(graph: Graph, dq: Node) -> bool:
    """Whether the DQ stands between the first product of attention and its softmax."""
    readers = graph.consumers(dq.outputs[0])
    q = graph.producer(dq.input(0), _Q)
    if q is None or not any(n.op == "Softmax" for n in readers):
        return False
    node = graph.producer(q.input(0))
    return node is not None and node.op in ("MatMul", "Add", "Mul", "Div", "Where")
