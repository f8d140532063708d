"""Small ONNX graphs and the two engines that run them: ONNX Runtime and onnx.reference."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

# Before 1.31 its QuantizeLinear of float16 tensors and of blocks gives codes a step away from those
# of the specification, so that what comes after them differs by more than rounding.
OLD_KERNELS = tuple(map(int, ort.__version__.split(".")[:2])) < (1, 31)
needs_half = pytest.mark.skipif(
    OLD_KERNELS, reason="ONNX Runtime below 1.31 quantizes float16 a step away"
)

OPTIMIZATIONS_OFF = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def session(model, optimize: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    # A thread that waits must not take the core of another worker.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = OPTIMIZATIONS_OFF
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(model, *inputs: np.ndarray, optimize: bool = False) -> list[np.ndarray]:
    ran = session(model, optimize)
    names = [i.name for i in ran.get_inputs()]
    return ran.run(None, dict(zip(names, inputs, strict=True)))


def quantize_model(
    scale: np.ndarray, axis: int | None, storage: int, x_type: int = TensorProto.FLOAT, opset=21
) -> onnx.ModelProto:
    """QuantizeLinear with zero point 0; types that NumPy lacks come back as float codes."""
    zero_point = helper.make_tensor(
        "zero_point", storage, scale.shape, np.zeros(max(1, scale.size), np.int64).tolist()
    )
    attributes = {} if axis is None else {"axis": axis}
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], **attributes)
    one = helper.make_tensor("one", TensorProto.FLOAT, scale.shape, np.ones(max(1, scale.size)))
    back = helper.make_node("DequantizeLinear", ["q", "one", "zero_point"], ["codes"], **attributes)
    foreign = storage in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN)
    graph = helper.make_graph(
        [node, back] if foreign else [node],
        "quantize",
        [helper.make_tensor_value_info("x", x_type, None)],
        [helper.make_tensor_value_info("codes", TensorProto.FLOAT, None)]
        if foreign
        else [helper.make_tensor_value_info("q", storage, None)],
        [onnx.numpy_helper.from_array(scale, "scale"), zero_point, *([one] if foreign else [])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def dynamic_quantize_model() -> onnx.ModelProto:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero_point"])
    outputs = [("q", TensorProto.UINT8), ("scale", 1), ("zero_point", TensorProto.UINT8)]
    graph = helper.make_graph(
        [node],
        "dynamic_quantize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
