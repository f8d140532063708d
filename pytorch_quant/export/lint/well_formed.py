"""Rules R1 to R13: Q/DQ nodes that a runtime can read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pytorch_quant.export.lint.finding import Problem, rule
from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import (
    BFLOAT16,
    E2M1,
    E4M3,
    E8M0,
    FLOAT,
    FLOAT16,
    INT2,
    INT4,
    INT8,
    INT32,
    UINT2,
    code_type,
    dqs_of,
    grid,
    scale_count,
)
from pytorch_quant.export.lint.operators import QDQ, WEIGHTED
from pytorch_quant.export.targets import TARGETS

_Q, _DQ = QDQ
_EXPORT = "export with export_onnx, which writes this"
_INTEGER_OPERATORS = (
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeLinear",
    "MatMulNBits",
)
HIGHEST_OPSET, LOWEST_OPSET, PINNED_IR = 25, 9, 10


@rule("R1", "error", "warning", title="Q and DQ are the standard operators")
def standard_domain(graph: Graph) -> Iterator[Problem]:
    """R1, error; a warning in TensorRT's own domain, which the user has opted in to (S2, S4)."""
    for node in graph.nodes:
        if node.domain and node.op.endswith(QDQ) and not node.op.startswith("Dynamic"):
            own = node.domain.startswith(("trt", "tensorrt"))
            yield Problem(
                node,
                f"it is {node.domain}::{node.op}, not an operator of ONNX",
                _EXPORT,
                "warning" if own else None,
            )


def _standard(graph: Graph) -> list[Node]:
    return [n for n in graph.of(*QDQ) if not n.domain]


@rule("R2", "error", title="Scales and zero points are constants", targets=TARGETS)
def constants(graph: Graph) -> Iterator[Problem]:
    """R2, error (S1, S4). Other runtimes take what DynamicQuantizeLinear computes."""
    for node in _standard(graph):
        for role, name in zip(("scale", "zero point"), node.inputs[1:3], strict=False):
            source = graph.producer(name)
            dynamic = source is not None and source.op == "DynamicQuantizeLinear"
            # For TensorRT the operator itself is R12.
            if name and not graph.constant(name) and not dynamic:
                yield Problem(
                    node,
                    f"its {role} {name} is computed at run time",
                    "calibrate the quantizer, so that its amax is a constant",
                )


@rule("R3", "error", title="Scales are finite and positive", targets=TARGETS)
def positive_scales(graph: Graph) -> Iterator[Problem]:
    """R3, error (S2, onnx-tensorrt #764). A scale of 0 in a weight is W6."""
    for node in graph.quantizers():
        value = graph.value(node.input(1))
        if value is None or graph.dtype(node.input(1)) == E8M0:
            continue
        bad = ~np.isfinite(value.astype(float)) | (value.astype(float) < 0)
        if not graph.constant(node.input(0)) or graph.target != "tensorrt":
            bad |= value.astype(float) == 0
        if bad.any():
            worst = float(value.astype(float)[bad].reshape(-1)[0])
            yield Problem(
                node, f"it has a scale of {worst:g}", "calibrate the quantizer with real inputs"
            )


@rule("R4", "error", title="Zero points are 0")
def zero_points(graph: Graph) -> Iterator[Problem]:
    """R4, error (S1, S4), for TensorRT alone: other runtimes take asymmetric grids."""
    for node in graph.quantizers():
        value = graph.value(node.input(2)) if node.input(2) else None
        if value is not None and bool((value.astype(float) != 0).any()):
            yield Problem(
                node,
                "its zero point is not 0, and TensorRT's grids are symmetric",
                "quantize with pytorch_quant, whose static quantization is symmetric",
            )


@rule(
    "R5", "error", title="Zero points have the shape of scales, Q the type of DQ", targets=TARGETS
)
def zero_point_shapes(graph: Graph) -> Iterator[Problem]:
    """R5, error (S2, S4)."""
    for node in _standard(graph):
        count = graph.entries(node.input(2)) if node.input(2) else None
        scale = scale_count(graph, node)
        if count is not None and scale is not None and count != scale:
            yield Problem(node, f"it has {scale} scales and {count} zero points", _EXPORT)
    for q in graph.of(_Q):
        for dq in dqs_of(graph, q):
            kinds = [graph.dtype(n.input(2)) for n in (q, dq)]
            if all(kinds) and kinds[0] != kinds[1]:
                yield Problem(dq, f"its zero point has another type than that of {q.name}", _EXPORT)


@rule("R6", "error", title="Codes are INT8, FP8 E4M3, INT4 or FP4")
def code_types(graph: Graph) -> Iterator[Problem]:
    """R6, error (S1, S4). INT32 codes are W5 and INT2 is O5."""
    import onnx

    for node in graph.quantizers():
        if node.domain or _dynamic(graph, node):
            continue
        kind = code_type(graph, node)
        if node.op == _Q and not node.input(2) and "output_dtype" not in node.attrs:
            yield Problem(
                node,
                "it has no zero point, which is UINT8 in ONNX and INT8 in TensorRT",
                _EXPORT,
            )
        elif kind and kind not in (INT8, E4M3, INT4, E2M1, INT32, INT2, UINT2):
            yield Problem(
                node,
                f"its codes are {onnx.TensorProto.DataType.Name(kind)}, which TensorRT does not "
                "take",
                "use a signed descriptor: QuantDescriptor(unsigned=False)",
            )


def _dynamic(graph: Graph, node: Node) -> bool:
    return graph.producer(node.input(0), "DynamicQuantizeLinear") is not None


@rule("R7", "error", title="Scales are per tensor, per channel or per block", targets=TARGETS)
def scale_shapes(graph: Graph) -> Iterator[Problem]:
    """R7, error (S2, S4). An axis that is missing or does not exist is R8."""
    for node in _standard(graph):
        scale, shape = graph.shape(node.input(1)), graph.shape(node.input(0))
        count = graph.entries(node.input(1))
        if scale is None or shape is None or count is None:
            continue
        if count == 1 and "block_size" not in node.attrs:
            continue
        rank = len(shape)
        if len(scale) == 1 and rank != 1:
            axis = node.attrs.get("axis")
            if axis is None or not -rank <= axis < rank or shape[axis] in (None, count):
                continue
            problem = f"it has {count} scales, and axis {axis} has {shape[axis]} entries"
        elif len(scale) == rank:
            parts = [
                (size, blocks)
                for size, blocks in zip(shape, scale, strict=True)
                if size is not None and size != blocks
            ]
            divides = all(blocks and size % blocks == 0 for size, blocks in parts)
            if len(parts) <= 1 and divides:
                continue
            problem = f"scales of shape {list(scale)} are no blocks of {list(shape)}"
        else:
            problem = f"scales of shape {list(scale)} do not fit a tensor of shape {list(shape)}"
        yield Problem(node, problem, _EXPORT)


@rule("R8", "error", "warning", title="Per-channel pairs say their axis", targets=TARGETS)
def explicit_axis(graph: Graph) -> Iterator[Problem]:
    """R8, error (S4); a warning in other runtimes where ONNX's default of 1 fits. Opset: O1."""
    for node in _standard(graph):
        scale = graph.shape(node.input(1))
        shape = graph.shape(node.input(0)) or ()
        rank = len(shape)
        if scale is None or len(scale) != 1 or scale[0] in (None, 1) or graph.opset < 13:
            continue
        if "axis" not in node.attrs:
            fits = graph.target != "tensorrt" and shape[1:2] == scale
            severity = "warning" if fits else "error"
            yield Problem(node, f"it has {scale[0]} scales and no axis", _EXPORT, severity)
        elif rank and not -rank <= node.attrs["axis"] < rank:
            yield Problem(
                node, f"axis {node.attrs['axis']} is outside of its {rank} dimensions", _EXPORT
            )


@rule("R9", "error", title="Scales are FP32, FP16 or BF16, and no Cast follows a DQ")
def scale_types(graph: Graph) -> Iterator[Problem]:
    """R9, error (S2, S3, S6). A Cast behind the DQ of a weight is W2, E8M0 is O5."""
    import onnx

    allowed = (FLOAT, FLOAT16, BFLOAT16)
    for node in _standard(graph):
        kind = graph.dtype(node.input(1))
        # NVFP4 has FP8 block scales, which a DQ of their own turns into float.
        if kind and kind not in (*allowed, E8M0):
            name = onnx.TensorProto.DataType.Name(kind)
            yield Problem(node, f"its scale is {name}", "export the model in float32 or half")
        elif kind in (FLOAT16, BFLOAT16) and graph.opset < 19:
            yield Problem(node, f"a half-precision scale in opset {graph.opset}", "opset=19")
        declared = node.attrs.get("output_dtype", 0)
        if node.op == _DQ and declared and declared not in allowed:
            yield Problem(node, "its output_dtype is no float type", _EXPORT)
    for node in graph.of(*WEIGHTED):
        for name in node.inputs[:2]:
            cast = graph.producer(name, "Cast")
            if cast is not None and not graph.constant(name):
                dq = graph.producer(cast.input(0), _DQ)
                if dq is not None:
                    yield Problem(
                        cast,
                        f"it stands between {dq.name} and {node.name}",
                        "export with opset 19 or higher, where Q/DQ takes half precision",
                    )


@rule("R10", "warning", title="A DQ has the scale and the axis of its Q", targets=TARGETS)
def pairs_agree(graph: Graph) -> Iterator[Problem]:
    """R10, warning (S4). Types that differ are R5."""
    for q in graph.of(_Q):
        for dq in dqs_of(graph, q):
            if q.input(1) == dq.input(1) and q.attrs.get("axis", 1) == dq.attrs.get("axis", 1):
                continue
            one, other = grid(graph, q), grid(graph, dq)
            if one.scale != other.scale:
                yield Problem(dq, f"its scale differs from that of {q.name}", _EXPORT)
            elif one.axis != other.axis:
                yield Problem(dq, f"its axis differs from that of {q.name}", _EXPORT)


@rule("R11", "warning", title="Q and DQ stand in pairs")
def adjacent_pairs(graph: Graph) -> Iterator[Problem]:
    """R11, warning (S1): TensorRT takes layout operators in between, and a Q as graph output."""
    for q in graph.of(_Q):
        strangers = [n for n in graph.consumers(q.outputs[0]) if n.op != _DQ]
        if q.outputs[0] in graph.outputs:
            yield Problem(q, "its codes are a graph output", "let the graph end in float")
        elif strangers:
            name = strangers[0].name
            yield Problem(q, f"its codes are read by {name}, which is no DQ", _EXPORT)
    for dq in graph.of(_DQ):
        source = graph.producer(dq.input(0))
        alone = source is None or source.op not in (_Q, "DynamicQuantizeLinear", "DynamicQuantize")
        behind_q = source is not None and graph.producer(source.input(0), _Q) is not None
        if alone and not graph.constant(dq.input(0)) and not behind_q:
            yield Problem(dq, "its codes come from no Q and no constant", _EXPORT)


@rule("R12", "error", title="No integer operators: TensorRT fuses Q/DQ itself")
def integer_operators(graph: Graph) -> Iterator[Problem]:
    """R12, error (S7)."""
    inner = [node for _, node in graph.inner_nodes()]
    for node in (*graph.nodes, *inner):
        if node.op in _INTEGER_OPERATORS:
            dynamic = node.op == "DynamicQuantizeLinear"
            fix = "use a static scheme such as INT8 and calibrate" if dynamic else _EXPORT
            yield Problem(node, f"TensorRT has no {node.op}", fix)


@rule("R13", "warning", title="Opset and IR version are ones that TensorRT and ONNX Runtime read")
def versions(graph: Graph) -> Iterator[Problem]:
    """R13, warning (S3, S6): opset 9 to 25, and an IR version no higher than 10 or needed."""
    import onnx

    if not LOWEST_OPSET <= graph.opset <= HIGHEST_OPSET:
        yield Problem(
            "the model",
            f"its opset is {graph.opset}; TensorRT 11 reads {LOWEST_OPSET} to {HIGHEST_OPSET}",
            "export_onnx(..., opset=20)",
        )
        return
    opset = onnx.helper.make_opsetid("", graph.opset)
    needed = max(PINNED_IR, onnx.helper.find_min_ir_version_for([opset], True))
    if graph.ir_version > needed:
        yield Problem(
            "the model",
            f"its IR version is {graph.ir_version}, and opset {graph.opset} needs no more than "
            f"{needed}; older runtimes refuse it",
            f"set model.ir_version = {needed}",
        )
