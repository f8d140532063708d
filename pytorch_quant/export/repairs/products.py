"""Integer products that ONNX Runtime would run in float for their float biases."""

from __future__ import annotations

from typing import Any

import numpy as np

from pytorch_quant.export.lint.graph import Graph
from pytorch_quant.export.lint.runtimes.onnxruntime import (
    float_for_its_bias,
    gemms_float_for_their_bias,
)
from pytorch_quant.export.wiring import Wiring, drop_unread, free_name, names


def keep_products(model: Any) -> int:
    """Write biases so that ONNX Runtime runs the quantized products in front of them on integers.

    It has no integer Gemm with a float bias and a float result. A Gemm loses its bias to an Add
    behind it. Of a MatMul and the Add of a bias of shape `(N,)` the runtime makes such a Gemm
    itself; a bias of shape `(1, 1, N)` adds the same and is left alone, where the product has
    three or more dimensions.

    Args:
        model: An `onnx.ModelProto`, all its data loaded, changed in place.

    Returns:
        The number of products.
    """
    return _split_gemms(model) + _reshape_biases(model)


def _split_gemms(model: Any) -> int:
    import onnx

    graph = Graph(model, None, "onnxruntime")
    taken = names(model.graph)
    split = 0
    for gemm in gemms_float_for_their_bias(graph):
        if gemm.attrs.get("beta", 1.0) != 1.0:
            continue
        result, bias = gemm.outputs[0], gemm.input(2)
        product = free_name(f"{result}_product", taken)
        place = next(i for i, node in enumerate(model.graph.node) if result in node.output)
        node = model.graph.node[place]
        del node.input[2:]
        node.output[0] = product
        name = free_name(f"{node.name}/bias", taken)
        add = onnx.helper.make_node("Add", [product, bias], [result], name=name)
        model.graph.node.insert(place + 1, add)
        split += 1
    return split


def _reshape_biases(model: Any) -> int:
    import onnx

    wiring, taken = Wiring(model.graph), names(model.graph)
    found = float_for_its_bias(Graph(model, None, "onnxruntime"))
    reshaped: dict[str, str] = {}
    kept = 0
    for add, bias in found:
        value = wiring.value(bias)
        if value is None:
            continue
        if bias not in reshaped:
            row = np.ascontiguousarray(value.reshape(1, 1, -1))
            readers = [name for _, name in found].count(bias)
            # Nobody else reads it: it keeps its name.
            own = bias in wiring.initializers and len(wiring.uses(bias)) == readers
            own = own and bias not in wiring.outputs | wiring.captured | wiring.inputs
            reshaped[bias] = bias if own else free_name(f"{bias}_row", taken)
            stored = onnx.numpy_helper.from_array(row, reshaped[bias])
            if own:
                wiring.initializers[bias].CopyFrom(stored)
            else:
                model.graph.initializer.append(stored)
        add.proto.input[add.inputs.index(bias)] = reshaped[bias]
        kept += 1
    drop_unread(model.graph, {bias for bias, name in reshaped.items() if bias != name})
    return kept
