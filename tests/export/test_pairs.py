import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pytorch_quant import calibrate, export_onnx
from pytorch_quant import nn as quant_nn
from pytorch_quant.export.pairs import merge_equal_pairs
from pytorch_quant.models import resnet18


def pairs_on(scales, types=None, read_by="Relu"):
    """A graph with a Q/DQ pair for each scale on one tensor, each read by a node of its own."""
    nodes, constants = [], []
    for i, scale in enumerate(scales):
        kind = np.int8 if types is None else types[i]
        constants.append(numpy_helper.from_array(np.float32(scale), f"s{i}"))
        constants.append(numpy_helper.from_array(np.array(0, kind), f"z{i}"))
        nodes += [
            helper.make_node("QuantizeLinear", ["x", f"s{i}", f"z{i}"], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}", f"z{i}"], [f"d{i}"]),
            helper.make_node(read_by, [f"d{i}"], [f"y{i}"]),
        ]
    outputs = [helper.make_tensor_value_info(f"y{i}", 1, [4]) for i in range(len(scales))]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])], outputs, constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def run(model, x):
    onnx.checker.check_model(model, full_check=True)
    return onnx_runs.run(model, x)


@pytest.mark.parametrize(
    ("scales", "types", "left"),
    [
        ([0.5, 0.5, 0.5], None, 1),
        ([0.5, 0.25, 0.5], None, 2),
        ([0.5, 0.5], [np.int8, np.uint8], 2),
    ],
)
def test_equal_pairs_on_one_tensor_become_one(scales, types, left):
    model = pairs_on(scales, types)
    x = np.array([-3, 0.3, 1.2, 80], np.float32)
    before = run(model, x)
    dropped = merge_equal_pairs(model.graph)
    kinds = [node.op_type for node in model.graph.node]
    assert dropped == 2 * (len(scales) - left)
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == left
    for a, b in zip(before, run(model, x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_outputs_of_the_graph_keep_their_names():
    model = pairs_on([0.5, 0.5])
    del model.graph.node[5], model.graph.node[2]
    for i in range(2):
        model.graph.output[i].name = f"d{i}"
    x = np.array([-3, 0.3, 1.2, 80], np.float32)
    before = run(model, x)
    assert merge_equal_pairs(model.graph) == 1
    for a, b in zip(before, run(model, x), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_residual_network_has_one_pair_for_each_tensor(tmp_path):
    model = resnet18(quantize=True, width=8, num_classes=4, small_input=True).eval()
    x = torch.randn(2, 3, 16, 16)
    calibrate(model, [x], progress=False)
    export_onnx(model, x, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    quantized = [n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantized) == len(set(quantized))
    (y,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(y, model(x).detach().numpy(), atol=2e-2)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = quant_nn.QuantLinear(4, 4), quant_nn.QuantLinear(4, 4)
        self.second._input_quantizer = self.first._input_quantizer

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_a_shared_quantizer_is_one_pair(tmp_path):
    model, x = Shared(), torch.randn(3, 4)
    calibrate(model, [x], progress=False)
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert report.quantize_nodes == 1
    assert report.dequantize_nodes == 3
