"""Rules L3, L13, L14, L15: what surrounds quantized layers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pytorch_quant.export.lint.finding import Problem, rule
from pytorch_quant.export.lint.graph import Graph
from pytorch_quant.export.lint.grids import BFLOAT16, FLOAT, FLOAT16, source_dq
from pytorch_quant.export.lint.operators import CONVOLUTIONS, QDQ, WEIGHTED

# What observers put in place of the scale of an empty range: float32's epsilon, 2**-23. The
# smallest scale of a half-precision file, 2**-24, lies below it.
DEAD_SCALE = 2.0**-23


@rule("L3", "warning", title="BatchNormalization is folded before the export")
def unfolded_batchnorm(graph: Graph) -> Iterator[Problem]:
    """L3, warning (S5, S7; TensorRT #1407 and #3366 fold it at build time)."""
    for node in graph.of("BatchNormalization"):
        conv = graph.producer(node.input(0), *CONVOLUTIONS)
        if conv is not None and source_dq(graph, conv.input(1)) is not None:
            yield Problem(
                node,
                f"it follows {conv.name}, whose weight is quantized; TensorRT folds it, others run "
                "an operator more",
                "fold_batchnorm(model) before the export",
            )


@rule("L13", "warning", title="In a half-precision file the float rest is in half precision")
def float32_regions(graph: Graph) -> Iterator[Problem]:
    """L13, warning (S1, ultralytics #26159).

    Judged are weighted operators that are not quantized. Softmax and norms in float32 are a choice
    for accuracy.
    """
    kinds = {node: graph.dtype(node.outputs[0]) for node in graph.of(*WEIGHTED)}
    if not any(kind in (FLOAT16, BFLOAT16) for kind in kinds.values()):
        return
    for node, kind in kinds.items():
        if kind == FLOAT and source_dq(graph, node.input(0)) is None:
            yield Problem(
                node,
                "it computes in float32 beside layers in half precision",
                "export the whole model in half precision: model.half()",
            )


@rule("L14", "warning", title="No quantizer of an activation is dead")
def dead_quantizers(graph: Graph) -> Iterator[Problem]:
    """L14, warning (S6).

    A scale of 0 or NaN is an error of R3, in a weight W6; here are scales that stand in for them,
    such as the epsilon of an observer that saw nothing.
    """
    for q in graph.of("QuantizeLinear"):
        scale = graph.value(q.input(1))
        if scale is None or graph.constant(q.input(0)):
            continue
        x = scale.astype(np.float64)
        if bool(((x > 0) & (x <= DEAD_SCALE)).any()):
            yield Problem(
                q,
                f"its scale is {float(x.min()):g}, as of a quantizer that saw zeros alone",
                "calibrate it with real inputs, or disable() it",
            )


@rule("L15", "warning", title="No Q/DQ in bodies of If and Loop, and none on integers")
def bodies_and_integers(graph: Graph) -> Iterator[Problem]:
    """L15, warning (S1, inferred)."""
    for outer, inner in graph.inner_nodes():
        if inner.op in QDQ:
            yield Problem(
                outer,
                f"{inner.name} stands inside of this {outer.op}",
                "disable() the quantizers of the module that this comes from",
            )
    for q in graph.of("QuantizeLinear"):
        kind = graph.dtype(q.input(0))
        if kind not in (0, FLOAT, FLOAT16, BFLOAT16):
            yield Problem(q, "it quantizes integers", "disable() this quantizer")
