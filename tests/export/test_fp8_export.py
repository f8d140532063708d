import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from pytorch_quant import FP8, QuantDescriptor, calibrate, export_onnx, lint_onnx
from pytorch_quant import nn as quant_nn


def network(axis=None):
    desc = {"quant_desc_input": FP8.input, "quant_desc_weight": FP8.weight.replace(axis=axis)}
    model = nn.Sequential(
        quant_nn.QuantConv2d(16, 32, 3, padding=1, **desc),
        nn.ReLU(),
        quant_nn.QuantConv2d(32, 32, 3, stride=2, **desc),
        nn.Flatten(),
        quant_nn.QuantLinear(288, 20, **desc),
    ).eval()
    x = torch.randn(2, 16, 8, 8)
    calibrate(model, [x], progress=False)
    return model, x


def e4m3(x, scale):
    """The nearest of all E4M3 values, ties to the even mantissa, saturated at 448."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    subnormal = exponent == 0
    values = np.where(subnormal, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    steps = np.abs(x.astype(np.float32) / np.float32(scale)).astype(np.float64)
    above = np.clip(np.searchsorted(values, steps), 1, 126)
    low, high = values[above - 1], values[above]
    nearer_high = steps - low > high - steps
    tie = steps - low == high - steps
    up = nearer_high | (tie & (codes[above] % 2 == 0))
    return np.sign(x) * np.where(up, high, low)


@pytest.mark.parametrize(("weights", "opset"), [("int8", 19), ("float", 21)])
def test_runs_as_it_was_simulated(tmp_path, weights, opset):
    model, x = network()
    with torch.no_grad():
        # Values outside of the range saturate.
        model[0].weight.mul_(1.5)
    path = tmp_path / "m.onnx"
    report = export_onnx(model, x, path, target="tensorrt", weights=weights, opset=opset)
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert report.opset == opset and report.integer_weights == (3 if weights == "int8" else 0)
    constants = {c.name: c for c in file.graph.initializer}
    for node in file.graph.node:
        if node.op_type.endswith("tizeLinear"):
            assert constants[node.input[2]].data_type == TensorProto.FLOAT8E4M3FN
            assert constants[node.input[1]].dims == []
    stored = constants.get("0.weight_quantized")
    if stored is not None:
        assert stored.data_type == TensorProto.FLOAT8E4M3FN
        codes = numpy_helper.to_array(stored).astype(np.float32)
        scale = numpy_helper.to_array(constants["0._weight_quantizer.scale"])
        assert np.abs(codes).max() == 448
        np.testing.assert_array_equal(codes, e4m3(model[0].weight.detach().numpy(), scale))
    expected = model(x).detach()
    (got,) = onnx_runs.run(path, x.numpy())
    np.testing.assert_allclose(got, expected, atol=5e-6)
    (got,) = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: x.numpy()})
    # A sum in another order moves a code of the next layer where it is at a tie.
    np.testing.assert_allclose(got, expected, atol=2e-2)
    assert not [f for f in lint_onnx(path, "tensorrt") if f.severity == "error"]


def test_per_channel_weights_of_convolutions_are_found_by_lint(tmp_path):
    """Versions of TensorRT differ (F5), so that the file is written."""
    model, x = network(axis=0)
    export_onnx(model, x, tmp_path / "m.onnx", target="tensorrt")
    found = [f for f in lint_onnx(tmp_path / "m.onnx", "tensorrt") if f.rule == "F5"]
    assert len(found) == 2 and all("per channel" in f.message for f in found)


def test_too_low_an_opset_is_refused_before_the_export(tmp_path):
    model = nn.Sequential(quant_nn.QuantLinear(4, 4, quant_desc_input=QuantDescriptor((4, 3))))
    calibrate(model, [torch.randn(2, 4)], progress=False)
    with pytest.raises(ValueError, match="opset=18 is too low for a model in FP8; use opset=19"):
        export_onnx(model, torch.randn(2, 4), tmp_path / "m.onnx", opset=18)
    assert list(tmp_path.iterdir()) == []
