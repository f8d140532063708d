"""Transposes behind the DequantizeLinear of a weight, applied to what is stored."""

import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pytorch_quant import QuantDescriptor, calibrate, export_onnx
from pytorch_quant import nn as quant_nn
from pytorch_quant.export.transposes import fold_weight_transposes


def constant(name, value, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def products(stored_as, readers=1, perm=(1, 0), axis=0, extra=()):
    """`x @ w.T` for each reader, `w` stored as codes or as float under a Q/DQ pair."""
    random = np.random.default_rng(0)
    scale = random.uniform(0.01, 0.02, 5 if axis is not None else ()).astype(np.float32)
    zero_point = np.zeros_like(scale, np.int8)
    attributes = {} if axis is None else {"axis": axis}
    constants = [constant("s", scale), constant("z", zero_point, np.int8)]
    nodes = []
    if stored_as == "codes":
        constants.append(constant("q", random.integers(-128, 128, (5, 4)), np.int8))
    else:
        constants.append(constant("w", random.normal(size=(5, 4))))
        nodes.append(helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], **attributes))
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], **attributes))
    outputs = []
    for i in range(readers):
        arguments = {} if perm is None else {"perm": perm}
        nodes.append(helper.make_node("Transpose", ["d"], [f"t{i}"], **arguments))
        nodes.append(helper.make_node("MatMul", ["x", f"t{i}"], [f"y{i}"]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [2, 3, 5]))
    for op, name, shape in extra:
        nodes.append(helper.make_node(op, ["d"], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4])
    graph = helper.make_graph(nodes, "g", [x], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model):
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    return onnx_runs.run(model, x)


@pytest.mark.parametrize("stored_as", ["codes", "float"])
@pytest.mark.parametrize("axis", [0, -2, None])
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("perm", [(1, 0), None])
def test_the_product_reads_the_dequantized_weight(stored_as, axis, readers, perm):
    model = products(stored_as, readers, perm, axis)
    before = run(model)
    assert fold_weight_transposes(model.graph) == readers
    kinds = [n.op_type for n in model.graph.node]
    assert "Transpose" not in kinds
    for node in model.graph.node:
        if axis is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert [a.i for a in node.attribute if a.name == "axis"] == [1]
    assert {tuple(c.dims) for c in model.graph.initializer if len(c.dims) == 2} == {(4, 5)}
    for a, b in zip(before, run(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert fold_weight_transposes(model.graph) == 0


@pytest.mark.parametrize("extra", [[("Identity", "same", [5, 4])], [("Relu", "r", [5, 4])]])
@pytest.mark.parametrize("stored_as", ["codes", "float"])
def test_a_weight_that_is_also_read_as_it_is_stays(stored_as, extra):
    model = products(stored_as, extra=extra)
    before = model.SerializeToString()
    assert fold_weight_transposes(model.graph) == 0
    assert model.SerializeToString() == before


def test_a_transpose_that_is_an_output_stays():
    model = products("codes")
    model.graph.output.append(helper.make_tensor_value_info("t0", TensorProto.FLOAT, [4, 5]))
    assert fold_weight_transposes(model.graph) == 0


def test_an_activation_is_no_weight():
    model = products("codes")
    del model.graph.initializer[2]
    model.graph.input.append(helper.make_tensor_value_info("q", TensorProto.INT8, [5, 4]))
    assert fold_weight_transposes(model.graph) == 0


def test_codes_of_half_a_byte_stay():
    model = products("codes", axis=None)
    model.opset_import[0].version = 21
    codes = helper.make_tensor("q", TensorProto.INT4, [5, 4], list(range(-8, 8)) + [0] * 4)
    model.graph.initializer[2].CopyFrom(codes)
    model.graph.initializer[1].CopyFrom(helper.make_tensor("z", TensorProto.INT4, [], [0]))
    assert fold_weight_transposes(model.graph) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize(
    "fields", [{}, {"num_bits": 4}, {"num_bits": (4, 3)}, {"narrow_range": True}], ids=str
)
def test_a_linear_layer_on_sequences(tmp_path, dynamo, weights, fields):
    desc = QuantDescriptor(axis=0, **fields)
    model = nn.Sequential(quant_nn.QuantLinear(16, 8, quant_desc_weight=desc)).eval()
    x = torch.randn(2, 3, 16)
    calibrate(model, [x], progress=False)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    export_onnx(model, x, tmp_path / "m.onnx", weights=weights, dynamo=dynamo)
    graph = onnx.load(tmp_path / "m.onnx").graph
    producers = {o: n for n in graph.node for o in n.output}
    (product,) = [n for n in graph.node if n.op_type == "MatMul"]
    dequantize = producers[product.input[1]]
    assert dequantize.op_type == "DequantizeLinear"
    assert [a.i for a in dequantize.attribute if a.name == "axis"] == [1]
    assert not any(n.op_type == "Transpose" for n in graph.node)
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=2e-6)
