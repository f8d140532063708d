"""Rules X1 to X3: what ONNX Runtime and OpenVINO make of a file on x86."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pytorch_quant.export.lint.finding import Problem, rule
from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import INT8, code_type, dqs_of, reads_fp8, source_dq
from pytorch_quant.export.lint.operators import WEIGHTED
from pytorch_quant.export.lint.runtimes import VERDICTS
from pytorch_quant.export.lint.runtimes.operands import float_operand, judged
from pytorch_quant.export.lint.weights import weight_dq

_CPU = ("onnxruntime", "openvino")
# Half of what int32 holds, so that the products have the other half.
_BIAS_CODES = 2**30


@rule("X1", "performance", title="Activations are uint8 on x86", targets=_CPU)
def signed_activations(graph: Graph) -> Iterator[Problem]:
    """X1, performance: the integer kernels of x86 multiply unsigned by signed codes.

    The dot product instruction VPDPBUSD of AVX512-VNNI takes unsigned and signed bytes (Intel 64
    and IA-32 Architectures Software Developer's Manual). OpenVINO has two exceptions, which have
    to be signed: inputs of ConvTranspose, and what lies between a Concat and a product.
    """
    signed = [
        q
        for q in graph.of("QuantizeLinear")
        if not graph.constant(q.input(0)) and code_type(graph, q) == INT8
    ]
    if graph.target == "openvino":
        signed = [q for q in signed if not _signed_in_openvino(graph, q)]
    if signed:
        yield Problem(
            "the model",
            f"{len(signed)} activations are int8, {signed[0].name} the first of them, and the "
            "integer kernels of x86 take uint8",
            f'write the same codes with zero point 128: fix_onnx(..., target="{graph.target}")',
        )


def _signed_in_openvino(graph: Graph, q: Node) -> bool:
    readers = [n for dq in dqs_of(graph, q) for n in graph.consumers(dq.outputs[0])]
    joined = graph.producer(q.input(0), "Concat") is not None
    wanting = ("ConvTranspose", "MatMul", "Gemm") if joined else ("ConvTranspose",)
    return any(n.op in wanting for n in readers)


@rule("X2", "error", title="Biases fit into int32", targets=("onnxruntime",))
def bias_range(graph: Graph) -> Iterator[Problem]:
    """X2, error: ONNX Runtime codes a float bias in int32 with step `s_x * s_w`, which saturates.

    The limit is `abs(bias) <= 2**30 * s_x * s_w`, half of what int32 holds.
    """
    for node in graph.of("Conv", "Gemm"):
        bias = graph.value(node.input(2)) if graph.constant(node.input(2)) else None
        data, weight = source_dq(graph, node.input(0)), weight_dq(graph, node.input(1))
        if bias is None or data is None or weight is None:
            continue
        s_x, s_w = graph.value(data.input(1)), graph.value(weight.input(1))
        if s_x is None or s_w is None or s_x.size != 1 or bias.dtype.kind != "f":
            continue
        if s_w.size not in (1, bias.size):
            continue
        step = s_x.astype(float).reshape(()) * s_w.astype(float).reshape(-1)
        beyond = np.abs(bias.astype(float).reshape(-1)) > _BIAS_CODES * step
        if beyond.any():
            yield Problem(
                node,
                f"the bias of {int(beyond.sum())} channels is larger than 2**30 steps of "
                f"{data.name} times {weight.name}, and saturates in int32",
                'export with export_onnx(..., target="onnxruntime"), which raises such scales',
            )


@rule("X3", "performance", title="What is quantized runs on integers", targets=_CPU)
def float_in_spite(graph: Graph) -> Iterator[Problem]:
    """X3, performance: both operands come from a DQ, and the runtime runs it in float all the same.

    Such as a Conv in ONNX Runtime whose result goes to no Q. `predict_int8` lists all operators.
    """
    for node in judged(graph):
        if node.op not in (*WEIGHTED, "Einsum") or float_operand(graph, node):
            continue
        runs, reason = VERDICTS[graph.target](graph, node)
        if not runs:
            yield Problem(
                node,
                f"both operands come from a DQ, and it runs in float: {reason}",
                _what_would_help(graph, node),
            )


def _what_would_help(graph: Graph, node: Node) -> str:
    if "BatchNormalization" in {reader.op for reader in graph.consumers(node.outputs[0])}:
        return "fold it before quantize(): fold_batchnorm(model, example_inputs)"
    if reads_fp8(graph, node):
        return "quantize in INT8, for which it has kernels"
    return f'place for this runtime: quantize(..., placement="{graph.target}")'
