"""Rules H1 to H4 and H6: quantized layers that run faster in float.

The arithmetic stands in functions of integers, so that a placement can be compared with it. H5 is
beside the pattern of attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytorch_quant.export.lint.finding import Problem, rule
from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import (
    E4M3,
    INT8,
    code_type,
    dqs_of,
    endpoints,
    source_dq,
    weight_input,
)
from pytorch_quant.export.lint.operators import (
    COPIES_AND_ACTIVATIONS,
    QUANTIZABLE,
    WEIGHTED,
)

SMALL = 16
LARGEST_FP8_FILTER = 32


def vector_reason(m: int | None, n: int | None) -> str | None:
    """H1: why a product `(m, k) @ (k, n)` stays float, or None.

    Args:
        m: Rows; None where they are the batch, or unknown.
        n: Columns; None if unknown.
    """
    if n == 1:
        return "N is 1"
    if m == 1:
        return "M is 1"
    return None


def small_product_reason(k: int | None, n: int | None) -> str | None:
    """H2: why a product `(m, k) @ (k, n)` stays float, or None; None is an unknown size."""
    for name, size in (("K", k), ("N", n)):
        if size is not None and size < SMALL:
            return f"{name} is {size}, below {SMALL}"
    return None


def int8_conv_reason(
    cin: int, cout: int, groups: int, kernel: Sequence[int], first: bool
) -> str | None:
    """H3: why an INT8 convolution stays float, or None.

    Args:
        cin: Input channels of one group, the second dimension of the weight.
        cout: Output channels.
        groups: Number of groups.
        kernel: Sizes of the kernel.
        first: Whether it reads an input of the network.
    """
    if cin >= SMALL and cout >= SMALL:
        return None
    if groups == 1:
        eights = cout % 8 == 0 or cin % 8 == 0
        if eights and (first or cin >= SMALL or cout >= SMALL) and len(set(kernel)) == 1:
            return None
    elif cout % 8 == 0 and all(size >= 3 for size in kernel):
        return None
    return f"it has {cin} input channels per group and {cout} output channels"


def fp8_conv_reason(cin: int, cout: int, kernel: Sequence[int]) -> str | None:
    """H4: why an FP8 convolution stays float, or None; the kernel's size is its product."""
    if cin <= SMALL or cout <= SMALL:
        return f"it has {cin} input channels per group and {cout} output channels"
    size = 1
    for length in kernel:
        size *= length
    return f"its kernel has {size} entries" if size > LARGEST_FP8_FILTER else None


def product_sizes(graph: Graph, node: Node) -> tuple[int | None, int | None, int | None]:
    """M, K and N of a product, None where unknown; M is None where it may hold the batch.

    With a weight it may: `(8, 1, K)` is eight samples as well as eight rows. So it may in a product
    of two dimensions.
    """
    a, b = graph.shape(node.input(0)), graph.shape(node.input(1))
    einsum = graph.einsum(node)
    if einsum is not None and a and b:
        return einsum.sizes(a, b, weight_input(graph, node))
    if not a or not b or len(a) < 2 or len(b) < 2:
        return None, None, None
    if node.op == "Gemm":
        flip_a, flip_b = node.attrs.get("transA", 0), node.attrs.get("transB", 0)
        return None, a[-2] if flip_a else a[-1], b[-2] if flip_b else b[-1]
    rows = None if len(a) < 3 or graph.constant(node.input(1)) else a[-2]
    return rows, a[-1] if a[-1] is not None else b[-2], b[-1]


def is_first(graph: Graph, node: Node) -> bool:
    """Whether a layer reads a graph input, through a Q/DQ pair if there is one."""
    name = node.input(0)
    while (source := graph.producer(name, "QuantizeLinear", "DequantizeLinear")) is not None:
        name = source.input(0)
    return name in graph.inputs


def is_rgb_conv(graph: Graph, node: Node) -> bool:
    """Whether a convolution reads an image of at most three channels."""
    weight = graph.shape(node.input(1))
    small = weight is not None and len(weight) > 2 and (weight[1] or 4) <= 3
    return small and is_first(graph, node)


def quantized_type(graph: Graph, node: Node) -> int:
    """The type of the codes that a layer computes on, 0 where it is not fully quantized."""
    data, weight = (source_dq(graph, node.input(i)) for i in (0, 1))
    if data is None or weight is None:
        return 0
    return code_type(graph, data)


def _conv(graph: Graph, node: Node) -> tuple[int, int, int, list[int]] | None:
    weight = graph.shape(node.input(1))
    if weight is None or None in weight or len(weight) < 3:
        return None
    sizes = [int(size or 0) for size in weight]
    return sizes[1], sizes[0], int(node.attrs.get("group", 1)), sizes[2:]


_FIX = "leave it float: quantize(model, {its name: None}), or disable() its quantizers"


@rule("H1", "performance", title="A product with a vector stays float")
def vectors(graph: Graph) -> Iterator[Problem]:
    """H1, performance (S6, `find_nodes_from_matmul_to_exclude`).

    Of products with a weight the source judges M in two dimensions, where it is the batch; here the
    batch is never judged, so M is one of products of two activations.
    """
    for node in graph.products():
        m, _, n = product_sizes(graph, node)
        reason = vector_reason(m, n)
        if reason and quantized_type(graph, node):
            yield Problem(node, f"{reason}, and int8 products with vectors gain nothing", _FIX)


@rule("H2", "performance", title="A product with K or N below 16 stays float")
def small_products(graph: Graph) -> Iterator[Problem]:
    """H2, performance (S6, `find_nodes_from_matmul_to_exclude`); what H1 finds is left to it."""
    for node in graph.products():
        m, k, n = product_sizes(graph, node)
        reason = small_product_reason(k, n)
        if reason and not vector_reason(m, n) and quantized_type(graph, node):
            yield Problem(node, f"{reason}: too small for the integer tensor cores", _FIX)


@rule("H3", "performance", title="An INT8 convolution of few channels stays float")
def int8_convs(graph: Graph) -> Iterator[Problem]:
    """H3, performance (S6, `find_nodes_from_convs_to_exclude`).

    The exception's "first layer or >= 16" is, in the source, "first layer, or Cin or Cout >= 16".
    """
    for node in graph.of("Conv"):
        sizes = _conv(graph, node)
        if sizes is None or quantized_type(graph, node) != INT8:
            continue
        reason = int8_conv_reason(*sizes, is_first(graph, node))
        if reason:
            yield Problem(node, f"{reason}, too few for an INT8 convolution", _FIX)


@rule("H4", "performance", title="An FP8 convolution of few channels or a large kernel stays float")
def fp8_convs(graph: Graph) -> Iterator[Problem]:
    """H4, performance (S6, `find_nodes_from_convs_to_exclude`).

    The kernel's size is the product of its dimensions. A first convolution of RGB images is L9.
    """
    for node in graph.of("Conv"):
        sizes = _conv(graph, node)
        if sizes is None or quantized_type(graph, node) != E4M3 or is_rgb_conv(graph, node):
            continue
        reason = fp8_conv_reason(sizes[0], sizes[1], sizes[3])
        if reason:
            yield Problem(node, f"{reason}, which FP8 convolutions are not fast for", _FIX)


@rule("H6", "performance", title="Copies and activations are not quantized for themselves")
def copies(graph: Graph) -> Iterator[Problem]:
    """H6, performance (S6).

    A pair whose readers are copies and activations, and nothing quantized behind them. Behind a
    weighted operator it is L2, on a graph output L9, with a Q behind it L7, and in front of a
    softmax and the like L11.
    """
    for q in graph.of("QuantizeLinear"):
        if _behind_weighted(graph, q.input(0)):
            continue
        tensors = [dq.outputs[0] for dq in dqs_of(graph, q)]
        readers = [n for name in tensors for n in graph.consumers(name)]
        if not readers or any(n.op not in COPIES_AND_ACTIVATIONS for n in readers):
            continue
        ends = [e for name in tensors for e in endpoints(graph, name)]
        if any(e is None or e.op in QUANTIZABLE or e.op == "QuantizeLinear" for e in ends):
            continue
        kinds = ", ".join(sorted({n.op for n in readers}))
        yield Problem(
            q, f"it quantizes for {kinds} alone, which gain nothing by it", "disable() it"
        )


def _behind_weighted(graph: Graph, tensor: str) -> bool:
    node = graph.producer(tensor)
    while node is not None and node.op in ("BatchNormalization", "Relu", "Clip", "Add"):
        used = [name for name in node.inputs if not graph.constant(name)]
        node = graph.producer(used[0]) if used else None
    return node is not None and node.op in WEIGHTED
