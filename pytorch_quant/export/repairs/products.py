"""Integer products that ONNX Runtime would fuse into a float one."""

from __future__ import annotations

from typing import Any

import numpy as np

from pytorch_quant.export.lint.graph import Graph
from pytorch_quant.export.lint.runtimes.onnxruntime import float_for_its_bias
from pytorch_quant.export.wiring import Wiring, drop_unread, free_name, names


def keep_products(model: Any) -> int:
    """Reshape the biases for which ONNX Runtime would run a quantized MatMul in float, in place.

    It makes a Gemm of a MatMul and the Add of a bias of shape `(N,)`, and has no integer Gemm with
    a float bias and a float result. A bias of shape `(1, 1, N)` adds the same and is left alone;
    the MatMul then runs on integers. Only products of three or more dimensions can be kept so.

    Args:
        model: An `onnx.ModelProto`, all its data loaded.

    Returns:
        The number of products.
    """
    import onnx

    graph = Graph(model, None, "onnxruntime")
    wiring, taken = Wiring(model.graph), names(model.graph)
    reshaped: dict[str, str] = {}
    kept = 0
    for add, bias in float_for_its_bias(graph):
        value = wiring.value(bias)
        if value is None:
            continue
        if bias not in reshaped:
            reshaped[bias] = free_name(f"{bias}_row", taken)
            row = np.ascontiguousarray(value.reshape(1, 1, -1))
            model.graph.initializer.append(onnx.numpy_helper.from_array(row, reshaped[bias]))
        add.proto.input[add.inputs.index(bias)] = reshaped[bias]
        kept += 1
    drop_unread(model.graph, set(reshaped))
    return kept
