"""Rules O1 to O6 and F1 to F6: opsets of formats, and what each format asks for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pytorch_quant.export.lint.finding import Problem, rule
from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import (
    E2M1,
    E4M3,
    E8M0,
    INT2,
    INT4,
    INT8,
    UINT2,
    UINT8,
    WEIGHT_ONLY,
    bound,
    code_type,
    scale_count,
    source_dq,
)
from pytorch_quant.export.lint.operators import CONVOLUTIONS, QDQ
from pytorch_quant.export.targets import TARGETS

_Q, _DQ = QDQ


def _too_low(graph: Graph, nodes: list[Node], what: str, floor: int) -> Iterator[Problem]:
    for node in nodes:
        if graph.opset < floor:
            yield Problem(
                node,
                f"{what} needs opset {floor}, and the file has {graph.opset}",
                f"export_onnx(..., opset={floor}), or higher",
            )


def _with_codes(graph: Graph, *types: int) -> list[Node]:
    return [n for n in graph.quantizers() if not n.domain and code_type(graph, n) in types]


@rule("O1", "error", title="INT8 needs opset 10, per channel 13", targets=TARGETS)
def int8_opset(graph: Graph) -> Iterator[Problem]:
    """O1, error (S3; the ONNX operator's versions)."""
    for node in _with_codes(graph, INT8, UINT8):
        count = scale_count(graph, node)
        per_channel = count is not None and count > 1 and "block_size" not in node.attrs
        what = "INT8 per channel" if per_channel else "INT8"
        yield from _too_low(graph, [node], what, 13 if per_channel else 10)


@rule("O2", "error", title="FP8 needs opset 19", targets=TARGETS)
def fp8_opset(graph: Graph) -> Iterator[Problem]:
    """O2, error (S3; the ONNX operator's versions)."""
    yield from _too_low(graph, _with_codes(graph, E4M3), "FP8", 19)


@rule("O3", "error", title="INT4 and blocks need opset 21", targets=TARGETS)
def int4_opset(graph: Graph) -> Iterator[Problem]:
    """O3, error (S3; the ONNX operator's versions)."""
    found = _with_codes(graph, INT4)
    blocks = [n for n in graph.quantizers() if "block_size" in n.attrs and n not in found]
    yield from _too_low(graph, found, "INT4", 21)
    yield from _too_low(graph, blocks, "block_size", 21)


@rule("O4", "error", title="FP4 needs opset 23", targets=TARGETS)
def fp4_opset(graph: Graph) -> Iterator[Problem]:
    """O4, error (S2, S6; the ONNX operator's versions)."""
    yield from _too_low(graph, _with_codes(graph, E2M1), "FP4", 23)


@rule("O5", "warning", title="E8M0 scales and INT2 are read by few runtimes", targets=TARGETS)
def rare_formats(graph: Graph) -> Iterator[Problem]:
    """O5, warning; opset 24 and 25, by the versions of the ONNX operator."""
    fix = "use INT8, FP8 or INT4"
    for node in graph.quantizers():
        if graph.dtype(node.input(1)) == E8M0:
            yield Problem(node, "E8M0 scales (opset 24) are read by few runtimes", fix)
        elif code_type(graph, node) in (INT2, UINT2):
            yield Problem(node, "INT2 (opset 25) is read by few runtimes", fix)


@rule("O6", "warning", title="The precision attribute of Q is ignored")
def ignored_precision(graph: Graph) -> Iterator[Problem]:
    """O6, warning (S4). ONNX has the attribute on Q alone, from opset 23 on."""
    for node in graph.of(*QDQ):
        if node.attrs.get("precision"):
            yield Problem(node, "TensorRT ignores its precision attribute", "leave it out")


@rule("F1", "error", "warning", title="Codes are in range, and scales cover the weights")
def codes_in_range(graph: Graph) -> Iterator[Problem]:
    """F1, error or warning (S1, S2).

    An integer type holds no code out of its range, so what can be wrong is an FP8 code that is NaN
    (error), and a float weight of more than twice the range that its scale covers (warning).
    """
    for node in _with_codes(graph, E4M3, INT8):
        if node.op == _DQ and code_type(graph, node) == INT8:
            continue
        value, scale = graph.value(node.input(0)), graph.value(node.input(1))
        if value is None or scale is None:
            continue
        if node.op == _DQ:
            if np.isnan(value.astype(np.float32)).any():
                yield Problem(node, "some of its FP8 codes are NaN", "calibrate this weight again")
            continue
        if scale.size > 1:
            axis = int(node.attrs.get("axis", 1)) % value.ndim
            if "block_size" in node.attrs:
                scale = np.repeat(scale, int(node.attrs["block_size"]), axis)
            else:
                scale = scale.reshape([-1 if a == axis else 1 for a in range(value.ndim)])
        limit = 2 * bound(code_type(graph, node)) * np.abs(scale.astype(float))
        if (np.abs(value.astype(float)) > limit).any():
            yield Problem(
                node,
                "the weight has values of more than twice the range that its scale covers",
                "calibrate this weight again: scale is amax/127 for INT8 and amax/448 for FP8",
                "warning",
            )


def _block(graph: Graph, node: Node) -> tuple[int, int, int | None] | None:
    """Axis counted from the end, block size, and length of the blocked dimension."""
    scale, shape = graph.shape(node.input(1)), graph.shape(node.input(0))
    if scale is None or shape is None or len(scale) != len(shape) or len(shape) < 2:
        return None
    differing = [a for a in range(len(shape)) if shape[a] != scale[a]]
    axis = int(node.attrs["axis"]) % len(shape) if "axis" in node.attrs else None
    if axis is None:
        if len(differing) != 1:
            return None
        axis = differing[0]
    size, blocks = shape[axis], scale[axis]
    declared = int(node.attrs.get("block_size", 0))
    if not declared and (size is None or not blocks):
        return None
    return axis - len(shape), declared or (size or 0) // (blocks or 1), size


@rule("F2", "error", title="INT4 is for weights, in blocks of 64 or 128")
def int4_weights(graph: Graph) -> Iterator[Problem]:
    """F2, error (S2). INT4 per tensor or per channel has no block to judge."""
    for node in _with_codes(graph, INT4):
        block = _block(graph, node)
        if not graph.constant(node.input(0)):
            problem, fix = "it is an activation in INT4", "use INT4_WEIGHT_ONLY"
        elif block is not None and block[1] not in (64, 128):
            problem = f"its blocks have {block[1]} entries; TensorRT takes 64 and 128"
            fix = "QuantDescriptor(num_bits=4, block_size=128)"
        elif block is not None and block[0] < -2:
            problem, fix = "its blocks run along neither of the last two axes", "block one of them"
        elif (graph.entries(node.input(0)) or 0) % 2:
            problem, fix = "it has an odd number of codes, two to a byte", "leave this layer float"
        else:
            continue
        yield Problem(node, problem, fix)


@rule("F3", "error", title="FP4 blocks have 16 entries, MXFP8 blocks 32")
def small_float_blocks(graph: Graph) -> Iterator[Problem]:
    """F3, error (S2)."""
    for node in _with_codes(graph, E2M1, E4M3):
        block = _block(graph, node)
        mx = graph.dtype(node.input(1)) == E8M0
        if block is None or (code_type(graph, node) == E4M3 and not mx):
            continue
        expected = 32 if mx else 16
        axis, size, length = block
        if size != expected:
            problem = f"its blocks have {size} entries, not {expected}"
        elif axis < -2:
            problem = "its blocks run along neither of the last two axes"
        elif length is None or length % size:
            problem = f"blocks of {size} do not divide {length}"
        else:
            continue
        yield Problem(node, problem, "block the last axis, or leave this layer float")


@rule("F4", "error", title="DynamicQuantize takes 2 or 3 dimensions and a constant scalar scale")
def dynamic_quantize(graph: Graph) -> Iterator[Problem]:
    """F4, error (S2), for the operators of TensorRT's own domain."""
    fix = "use INT8 or FP8 for this layer, or leave it float"
    for node in graph.nodes:
        if not node.domain or not node.op.endswith("DynamicQuantize"):
            continue
        shape = graph.shape(node.input(0))
        if shape is not None:
            axis = int(node.attrs.get("axis", -1))
            if len(shape) not in (2, 3):
                yield Problem(node, f"its input has {len(shape)} dimensions, not 2 or 3", fix)
                continue
            if shape[axis] is None:
                yield Problem(node, "the dimension that it blocks varies", fix)
                continue
        scale = node.input(1)
        if scale and not (graph.constant(scale) and graph.entries(scale) in (None, 1)):
            yield Problem(node, "its double_quant_scale is no constant scalar", fix)


@rule("F5", "error", "performance", title="Convolutions are INT8, or FP8 with per-tensor weights")
def convolution_formats(graph: Graph) -> Iterator[Problem]:
    """F5, error or performance (S1, S6, S7, Model-Optimizer #118).

    INT4 and FP4 are errors. FP8 weights per channel are a performance finding: versions differ, and
    where they are refused the layer runs in float. That FP8 convolutions need a strongly typed
    build cannot be seen in a file.
    """
    for node in graph.of(*CONVOLUTIONS):
        dqs = [dq for i in (0, 1) if (dq := source_dq(graph, node.input(i))) is not None]
        types = [code_type(graph, dq) for dq in dqs]
        if any(kind in WEIGHT_ONLY for kind in types):
            yield Problem(
                node, "a convolution has no INT4 or FP4 form", "use INT8 or FP8 for convolutions"
            )
            continue
        weight = source_dq(graph, node.input(1))
        if weight is None or code_type(graph, weight) != E4M3:
            continue
        if (scale_count(graph, weight) or 1) > 1:
            yield Problem(
                node,
                "its FP8 weight is per channel, which not all versions take",
                "quant_desc_weight=QuantDescriptor((4, 3), axis=None) for convolutions",
                "performance",
            )


@rule("F6", "performance", title="The FP8 scale of a softmax is 1/448")
def softmax_scale(graph: Graph) -> Iterator[Problem]:
    """F6, performance (S6): probabilities end at 1."""
    for q in graph.of(_Q):
        scale = graph.value(q.input(1))
        if graph.producer(q.input(0), "Softmax") is None or scale is None or scale.size != 1:
            continue
        if code_type(graph, q) == E4M3 and not np.isclose(float(scale.reshape(())), 1 / 448, 1e-3):
            yield Problem(
                q,
                f"it quantizes a softmax to FP8 with a scale of {float(scale.reshape(())):g}",
                "fix its range: QuantDescriptor((4, 3), amax=1.0)",
            )
