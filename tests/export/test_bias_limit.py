"""Weight scales raised so that ONNX Runtime's int32 bias does not saturate."""

import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from pytorch_quant import calibrate, export_onnx, quantize
from pytorch_quant import nn as quant_nn

LAYERS = {
    "conv": (lambda: quant_nn.QuantConv2d(4, 6, 3), (2, 4, 5, 5), 0),
    "grouped": (lambda: quant_nn.QuantConv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 0),
    "transposed": (lambda: quant_nn.QuantConvTranspose2d(4, 6, 3), (2, 4, 5, 5), 1),
    "linear": (lambda: quant_nn.QuantLinear(8, 6), (3, 8), 0),
    "linear on a sequence": (lambda: quant_nn.QuantLinear(8, 6), (2, 3, 8), 0),
}


def layer(kind, size):
    """A layer with bias 1 whose channel 2 has weights of `size`."""
    make, shape, axis = LAYERS[kind]
    model, x = nn.Sequential(make(), nn.ReLU(), nn.Identity()), torch.randn(shape)
    with torch.no_grad():
        model[0].weight.select(axis, 2).fill_(size)
        model[0].bias.fill_(1.0)
    calibrate(model.eval(), [x], progress=False)
    return model, x


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-30])
@pytest.mark.parametrize("kind", LAYERS)
def test_dead_and_near_dead_channels_agree_with_optimizations(tmp_path, kind, size, dynamo):
    if not dynamo and size != 1e-12:
        pytest.skip("one size by the older exporter")
    model, x = layer(kind, size)
    report = export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime", dynamo=dynamo)
    # A dead channel has the largest scale of its tensor.
    assert report.raised_channels == (size > 0)
    assert ("1 weight scales raised" in str(report)) == (size > 0)
    (plain,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    (fused,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy(), optimize=True)
    np.testing.assert_allclose(fused, plain, atol=1e-5)
    np.testing.assert_allclose(plain, model(x).detach(), atol=1e-5)


def test_the_raised_scale_is_the_limit(tmp_path):
    model, x = layer("conv", 1e-12)
    scales = {}
    for target in ("openvino", "onnxruntime"):
        export_onnx(model, x, tmp_path / "m.onnx", target=target)
        values = {
            c.name: numpy_helper.to_array(c)
            for c in onnx.load(tmp_path / "m.onnx").graph.initializer
        }
        scales[target] = values["0._weight_quantizer.scale"]
        step = float(values["0._input_quantizer.scale"])
    changed = scales["openvino"] != scales["onnxruntime"]
    assert changed.tolist() == [False, False, True, False, False, False]
    needed = 1.0 / (2**30 * step)
    assert needed <= scales["onnxruntime"][2] <= needed * (1 + 1e-6)


def test_a_residual_chain_with_a_near_dead_channel_saturates_without_the_limit(tmp_path):
    """The limit is needed: where nothing raises the scale, the fused bias is wrong."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    model.append(nn.Conv2d(8, 8, 3))
    x = torch.randn(2, 3, 10, 10)
    with torch.no_grad():
        model[2].weight[1] = 1e-12
        model[2].bias.fill_(1.0)
    quantize(model.eval(), example_inputs=x, placement="onnxruntime")
    calibrate(model, [x], progress=False)
    errors = {}
    for target in ("openvino", "onnxruntime"):
        export_onnx(model, x, tmp_path / "m.onnx", target=target)
        (plain,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
        (fused,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy(), optimize=True)
        errors[target] = float(np.abs(plain - fused).max())
    assert errors["onnxruntime"] < 2e-2 < errors["openvino"]


def test_a_shared_weight_takes_the_largest_bias(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = quant_nn.QuantLinear(8, 8), quant_nn.QuantLinear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) + self.b(x)

    model, x = Tied().eval(), torch.randn(3, 8)
    with torch.no_grad():
        model.a.weight[4] = 1e-12
        model.a.bias.fill_(0.5)
        model.b.bias.fill_(2.0)
    calibrate(model, [x], progress=False)
    report = export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    assert report.raised_channels == 1 and report.integer_weights == 1
    (plain,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    (fused,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy(), optimize=True)
    np.testing.assert_allclose(fused, plain, atol=1e-5)
    np.testing.assert_allclose(plain, model(x).detach(), atol=1e-5)
