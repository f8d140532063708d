"""Rules L4, L6, L8: operators that join two tensors, and poolings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from pytorch_quant.export.lint.attention import attentions
from pytorch_quant.export.lint.finding import Problem, rule
from pytorch_quant.export.lint.float_layers import quantized_type
from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import (
    endpoints,
    grid,
    only_quantized,
    source_dq,
)
from pytorch_quant.export.lint.operators import (
    CONVOLUTIONS,
    NORMS_AND_CLIPS,
    POOLS,
    QDQ,
    WEIGHTED,
)

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_AFFINE = ("Mul", "Div", "Add", "Sub")
_IDENTITIES = ("Cast", "Identity", "Dropout")
# Elementwise functions of one tensor: a Mul of a tensor with one of them is an activation.
_ELEMENTWISE = frozenset(
    [
        "Sigmoid",
        "HardSigmoid",
        "Tanh",
        "Erf",
        "Exp",
        "Softplus",
        "Relu",
        "Clip",
        "Add",
        "Mul",
        "Div",
        "Pow",
        "Sub",
        "Neg",
        "Cast",
    ]
)


def conv_side(graph: Graph, tensor: str) -> Node | None:
    """The quantized convolution at whose end `tensor` stands, for it alone, so that the Add fuses.

    A Q/DQ pair in between is looked through, as are BatchNormalization, Relu, Clip, casts, and
    arithmetic with constants.
    """
    while graph.sole_consumer(tensor):
        node = graph.producer(tensor)
        if node is None or node.op in CONVOLUTIONS:
            return node if node is not None and quantized_type(graph, node) else None
        before = activations(graph, node)
        rescaled = node.op in _AFFINE and len(before) == 1
        if not (rescaled or node.op in (*NORMS_AND_CLIPS, *QDQ, *_IDENTITIES)) or not before:
            return None
        tensor = before[0]
    return None


def distances(graph: Graph, tensor: str) -> dict[str, int]:
    """For each tensor upstream, the fewest weighted operators on the way."""
    found = {tensor: 0}
    pending = deque([tensor])
    while pending:
        name = pending.popleft()
        node = graph.producer(name)
        if node is None:
            continue
        step = found[name] + (node.op in WEIGHTED)
        for used in node.inputs:
            if used and not graph.constant(used) and found.get(used, step + 1) > step:
                found[used] = step
                # Breadth first with steps of 0 and 1: those of 0 go in front.
                (pending.append if node.op in WEIGHTED else pending.appendleft)(used)
    return found


def shorter_branch(graph: Graph, first: str, second: str) -> int | None:
    """Which of two branches is the shorter way to where they part; None if neither is."""
    one, other = distances(graph, first), distances(graph, second)
    shared = [name for name in one if name in other]
    if not shared:
        return None
    nearest = min(shared, key=lambda name: one[name] + other[name])
    if one[nearest] == other[nearest]:
        return None
    return 0 if one[nearest] < other[nearest] else 1


def activations(graph: Graph, node: Node) -> list[str]:
    """The inputs of a node that are no constants."""
    return [name for name in node.inputs if name and not graph.constant(name)]


@rule("L4", "performance", title="A residual Add has Q/DQ on the identity branch alone")
def residual_add(graph: Graph) -> Iterator[Problem]:
    """L4, performance (S1, S5, S6, TensorRT #1992).

    Judged where one branch ends in a quantized convolution that only the Add reads, whatever
    becomes of the result, and both branches have one shape. Of two such branches the one with fewer
    weighted operators since their common ancestor has the pair; either, if they are as long.
    """
    for node in graph.of("Add"):
        sides = activations(graph, node)
        convs = [conv_side(graph, name) is not None for name in sides]
        if len(sides) != 2 or not any(convs):
            continue
        quantized = [source_dq(graph, name) is not None for name in sides]
        short: int | None = convs.index(False) if not all(convs) else None
        if all(convs):
            short = shorter_branch(graph, *sides)
        place = "either branch" if short is None else f"input {short}"
        which = "shorter" if all(convs) else "identity"
        if all(quantized):
            yield Problem(
                node,
                "both inputs come from a DQ, so the convolution and the Add are not fused",
                f"disable() the residual quantizer on the convolution side; keep {place}",
            )
        elif not any(quantized):
            shapes = [graph.shape(name) for name in sides]
            if None not in shapes and shapes[0] != shapes[1]:
                continue
            yield Problem(
                node,
                "its convolution is quantized and neither input is, so the identity stays float "
                "and the Add is not fused into the convolution",
                f"add a residual quantizer on {place}, the {which} branch: QuantAdd with it as "
                "the second operand, or quantize(model, example_inputs=...)",
            )
        elif short is not None and quantized[1 - short]:
            yield Problem(
                node,
                f"input {1 - short} comes from a DQ and {place}, the {which} branch, does not",
                f"move the residual quantizer to {place}",
            )


@rule("L6", "performance", title="All inputs of a Concat and its result share one scale")
def concat_scales(graph: Graph) -> Iterator[Problem]:
    """L6, performance (S1, S5, S6).

    Float inputs are fine where the result is quantized: the one Q moves in front of the Concat.
    """
    for node in graph.of("Concat"):
        inputs = activations(graph, node)
        dqs = [source_dq(graph, name) for name in inputs]
        behind = [e for e in endpoints(graph, node.outputs[0]) if e is not None and e.op == _Q]
        known = [dq for dq in dqs if dq is not None]
        # Several Q nodes on one float tensor are L5.
        grids = dict.fromkeys(grid(graph, n) for n in (*known, *(behind if known else ())))
        fix = (
            "let the inputs and the result share one quantizer: QuantConcat, whose "
            "_input_quantizer is assigned to the layers that read the same tensors too, or "
            "quantize(model, example_inputs=...)"
        )
        if len(grids) > 1:
            yield Problem(node, f"its inputs and its result have {len(grids)} scales", fix)
        elif known and len(known) < len(inputs) and not behind:
            missing = [i for i, dq in enumerate(dqs) if dq is None]
            yield Problem(node, f"inputs {missing} of its {len(inputs)} inputs are float", fix)


@rule("L8", "performance", title="An int8 result of pooling, Mul or Add needs int8 inputs")
def quantized_inputs(graph: Graph) -> Iterator[Problem]:
    """L8, performance (S1).

    AveragePool, GlobalAveragePool and ReduceMean over spatial axes, whose results are all quantized
    and whose input is float; Mul and Add of two tensors where one alone is quantized, or the result
    is and the inputs are not. A residual Add is L4 alone. A Mul of a tensor with a function of
    itself (SiLU, GELU) is an activation and no finding; what stands between the product and the
    softmax of attention is L12.
    """
    scores = {node for found in attentions(graph) for node in found.between}
    for node in graph.of(*POOLS, "ReduceMean", "Mul", "Add"):
        if node in scores or (node.op == "ReduceMean" and not _spatial(graph, node)):
            continue
        sides = activations(graph, node)
        if len(sides) != (2 if node.op in ("Mul", "Add") else 1):
            continue
        if node.op == "Add" and any(conv_side(graph, name) is not None for name in sides):
            continue
        if node.op == "Mul" and _is_activation(graph, sides):
            continue
        missing = [i for i, name in enumerate(sides) if source_dq(graph, name) is None]
        if len(sides) == 2 and len(missing) == 1:
            yield Problem(
                node,
                f"input {missing[0]} is float and the other comes from a DQ",
                "quantize both inputs, or disable() the quantizer of the one",
            )
        elif missing and only_quantized(graph, node.outputs[0]):
            yield Problem(
                node,
                "its result is quantized and its input is float, so it runs in float",
                "quantize its inputs (a Quant* layer, or quantize(model, example_inputs=...)), or "
                "leave what follows float",
            )


def _spatial(graph: Graph, node: Node) -> bool:
    """Whether a ReduceMean is a pooling: over axes behind batch and channels."""
    given = graph.value(node.input(1)) if node.input(1) else node.attrs.get("axes")
    rank = len(graph.shape(node.input(0)) or ())
    if given is None:
        return False
    axes = np.asarray(given).reshape(-1).tolist()
    if not rank:
        return sorted(axes) == [-2, -1]
    return rank > 2 and sorted(a % rank for a in axes) == list(range(2, rank))


def _is_activation(graph: Graph, sides: list[str]) -> bool:
    """Whether one operand is an elementwise function of the other."""
    for tensor, other in (sides, sides[::-1]):
        node = graph.producer(tensor)
        while node is not None and node.op in _ELEMENTWISE:
            used = activations(graph, node)
            if len(used) != 1:
                break
            if used[0] == other or _same_source(graph, used[0], other):
                return True
            node = graph.producer(used[0])
    return False


def _same_source(graph: Graph, tensor: str, other: str) -> bool:
    """Whether `other` is `tensor` scaled by a constant, as in x * 0.5 * (1 + erf(x))."""
    node = graph.producer(other, "Mul", "Div")
    return node is not None and activations(graph, node) == [tensor]
