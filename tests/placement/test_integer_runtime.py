"""What ONNX Runtime makes of a network that was placed for it."""

from collections import Counter

import onnx
import onnxruntime
import torch
from torch import nn

from pytorch_quant import calibrate, export_onnx, fold_batchnorm, quantize


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.down = nn.Identity()
        if c_in != c_out:
            self.down = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.down(x)).relu()


def test_a_residual_network_is_computed_in_integers(tmp_path):
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16))
    model = nn.Sequential(stem, *blocks, head).eval()
    x = torch.randn(2, 3, 16, 16)
    quantize(model, example_inputs=x, placement="onnxruntime")
    fold_batchnorm(model)
    calibrate(model, [x], progress=False)
    export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    count = Counter(node.op_type for node in graph.node)
    assert (count["QLinearConv"], count["QLinearAdd"]) == (8, 3)
    assert not {"Conv", "FusedConv", "Relu"} & set(count)
    # The bias of the classifier, whose product is one of integers.
    assert (count["QGemm"], count["Add"]) == (1, 1)
