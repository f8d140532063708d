"""`predict_int8`: which operators of a file will run on integers, before an engine is built."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytorch_quant.export.lint.graph import Graph, Node, open_graph
from pytorch_quant.export.lint.grids import reads_fp8, weight_input
from pytorch_quant.export.lint.runtimes import VERDICTS
from pytorch_quant.export.lint.runtimes.operands import ON_CODES, judged, on_codes
from pytorch_quant.export.targets import check_target
from pytorch_quant.tables import aligned

if TYPE_CHECKING:
    from onnx import ModelProto

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", *ON_CODES)


@dataclass(frozen=True)
class Row:
    """What becomes of one operator.

    Attributes:
        node: Name of the ONNX node; its type and first output where it has no name.
        op: Its type.
        int8: Whether it runs on 8-bit codes.
        reason: Why.
        macs: Its multiply-accumulates, for a batch of 1 where the batch varies; None where shapes
            are unknown, 0 for operators without a product.
        fp8: Whether the codes are FP8.
    """

    node: str
    op: str
    int8: bool
    reason: str
    macs: int | None
    fp8: bool = False

    @property
    def runs_in(self) -> str:
        """`int8`, `fp8` or `float`."""
        return "float" if not self.int8 else "fp8" if self.fp8 else "int8"


@dataclass(frozen=True)
class Prediction:
    """What a runtime will do with a file.

    Attributes:
        target: The runtime.
        rows: An entry for each convolution, product, pooling, add, multiplication and concatenation
            of float tensors, in the order of the file.
    """

    target: str
    rows: list[Row]

    @property
    def float_rows(self) -> list[Row]:
        """The operators that fall back to float."""
        return [row for row in self.rows if not row.int8]

    @property
    def share(self) -> float | None:
        """The part of all multiply-accumulates that runs in int8; None where shapes are unknown."""
        macs = [row.macs for row in self.rows]
        known = [count for count in macs if count is not None]
        if len(known) < len(macs) or not sum(known):
            return None
        return sum(row.macs or 0 for row in self.rows if row.int8) / sum(known)

    def __str__(self) -> str:
        rows = [("node", "op", "runs in", "why")]
        rows += [(r.node, r.op, r.runs_in, r.reason) for r in self.rows]
        count = len(self.rows) - len(self.float_rows)
        kinds = sorted({row.runs_in for row in self.rows if row.int8}) or ["int8"]
        total = f"{self.target}: {count} of {len(self.rows)} operators in {' or '.join(kinds)}"
        if self.share is not None:
            total += f", {self.share:.1%} of the multiply-accumulates"
        return "\n".join([*aligned(rows), total])


def predict_int8(path: str | os.PathLike[str] | ModelProto, target: str = "tensorrt") -> Prediction:
    """Say which operators of a Q/DQ ONNX file a runtime will run in int8, and why not the others.

    The documented fusion rules of the runtimes, applied to the graph; nothing is built or run. For
    ONNX Runtime and OpenVINO they are those of their CPU kernels on x86.

    Args:
        path: The file, or a model in memory.
        target: `"tensorrt"`, `"onnxruntime"` or `"openvino"`.

    Raises:
        OSError: the file or its external data is missing or cannot be read.
        ValueError: the file is no ONNX model, or its nodes are not in order; an unknown target.
    """
    check_target(target)
    graph = open_graph(path, target)
    rows = []
    for node in judged(graph):
        if on_codes(node) and target != "onnxruntime":
            runs, reason = False, f"an operator of ONNX Runtime, which {target} does not have"
        else:
            runs, reason = VERDICTS[target](graph, node)
        rows.append(
            Row(node.name, node.op, runs, reason, _macs(graph, node), reads_fp8(graph, node))
        )
    return Prediction(target, rows)


def _sizes(graph: Graph, tensor: str) -> tuple[int, ...] | None:
    shape = graph.shape(tensor)
    if not shape:
        return None
    known = (shape[0] or 1, *shape[1:])
    return None if None in known else tuple(size or 0 for size in known)


def _macs(graph: Graph, node: Node) -> int | None:
    if node.op not in _PRODUCTS:
        return 0
    left, right = _sizes(graph, node.input(0)), _sizes(graph, node.input(1))
    out = _sizes(graph, node.outputs[0])
    if left is None or right is None or out is None or "LSTM" in node.op or node.op == "GRU":
        return None
    if node.op in ("Conv", "ConvInteger"):
        return math.prod(out) * math.prod(right[1:])
    if node.op == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    if node.op == "Einsum":
        weight = weight_input(graph, node)
        return None if weight is None else math.prod(left if weight else right) * right[-1]
    inner = left[0] if node.attrs.get("transA", 0) and node.op == "Gemm" else left[-1]
    return math.prod(out) * inner
