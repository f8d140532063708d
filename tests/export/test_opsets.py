"""A plain `torch.onnx.export` writes a valid file whatever operator set it is asked for."""

import logging

import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from pytorch_quant import calibrate
from pytorch_quant import nn as quant_nn
from pytorch_quant.qdq import value_behind
from pytorch_quant.versions import TORCH

pytestmark = pytest.mark.filterwarnings("ignore")
OPSETS = [13, 17, 18, 20, 21, 23]
EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def three_linear(dtype=torch.float32, axis=0):
    weight = quant_nn.QuantLinear.default_quant_desc_weight.replace(axis=axis)
    layers = [quant_nn.QuantLinear(16, 16, quant_desc_weight=weight) for _ in range(3)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[1].weight[3] = 0  # a dead channel takes the largest scale of its tensor
    x = torch.randn(4, 16)
    calibrate(model, [x], progress=False)
    return model.to(dtype), x.to(dtype)


def exported(model, x, path, dynamo, opset):
    if not dynamo and opset > 20:
        pytest.skip("the TorchScript exporter ends at opset 20")
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad():
            extra = {"verbose": False} if dynamo else {}
            torch.onnx.export(model, (x,), path, dynamo=dynamo, opset_version=opset, **extra)
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(path)


def cannot_convert_down(dynamo, opset):
    """Whether torch itself fails, with a float model as well; asserts nothing."""
    return dynamo and opset < 18 and TORCH < (2, 9)


@pytest.mark.slow
@PRECISIONS
@EXPORTERS
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("axis", [0, None], ids=["per-channel", "per-tensor"])
def test_three_linear_layers(tmp_path, axis, opset, dynamo, dtype):
    model, x = three_linear(dtype, axis)
    path = tmp_path / "m.onnx"
    if cannot_convert_down(dynamo, opset):
        wanted = rf"opset {opset} from .*needs torch 2\.9 or newer, and this is .*dynamo=False"
        with pytest.raises(Exception, match=wanted):
            exported(model, x, path, dynamo, opset)
        assert not path.exists()
        return
    file = exported(model, x, path, dynamo, opset)
    (written,) = (entry.version for entry in file.opset_import)
    # Where its conversion fails, torch keeps 18.
    assert written == opset or (dynamo and opset < written == 18)
    onnx.checker.check_model(file, full_check=True)
    pairs = [n for n in file.graph.node if n.op_type == "QuantizeLinear"]
    assert len(pairs) == 6
    constants = {c.name: numpy_helper.to_array(c) for c in file.graph.initializer}
    constants |= {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t)
        for n in file.graph.node
        if n.op_type == "Constant"
    }
    half = dtype == torch.float16 and written >= 19 and opset >= 19
    for node in pairs:
        scale = constants[node.input[1]]
        assert scale.dtype == (np.float16 if half else np.float32)
        assert (scale > 0).all() and constants[node.input[2]].dtype == np.int8
    if axis == 0:
        (scale,) = (
            (constants[n.input[1]] for n in pairs if "1.weight" in n.input[0])
            if not (dtype == torch.float16 and not half)
            else (constants[pairs[3].input[1]],)
        )
        assert scale[3] == scale.max()
    (got,) = onnx_runs.run(path, x.numpy())
    with torch.no_grad():
        wanted = model(x).float().numpy()
    # One step of half precision moves a code of the next layer.
    atol = 1e-6 if dtype == torch.float32 else 2e-2
    np.testing.assert_allclose(got.astype(np.float32), wanted, atol=atol)


@EXPORTERS
def test_fp8_below_opset_19_is_refused(tmp_path, dynamo):
    model = nn.Sequential(quant_nn.QuantLinear(16, 16)).eval()
    for quantizer in (model[0].input_quantizer, model[0].weight_quantizer):
        quantizer.num_bits = (4, 3)
    x = torch.randn(4, 16)
    calibrate(model, [x], progress=False)
    with pytest.raises(Exception, match=r"E4M3 codes need opset 19, and torch\.onnx\.export was"):
        exported(model, x, tmp_path / "m.onnx", dynamo, 18)
    exported(model, x, tmp_path / "m.onnx", dynamo, 19)


@EXPORTERS
def test_more_channels_than_the_exporter_folds(tmp_path, dynamo):
    model, x = nn.Sequential(quant_nn.QuantLinear(2, 9000)).eval(), torch.randn(4, 2)
    calibrate(model, [x], progress=False)
    file = exported(model, x, tmp_path / "m.onnx", dynamo, 18)
    kinds = {n.op_type for n in file.graph.node}
    assert kinds <= {"QuantizeLinear", "DequantizeLinear", "Gemm", "Constant"}


def test_values_behind_what_is_traced():
    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("held", torch.tensor([1.5, 2.5]))
            self.p = nn.Parameter(torch.tensor([3.5]))

        def forward(self, x):
            seen.append([value_behind(t) for t in (self.held, self.p, self.held * 2, x)])
            return x * self.held

    seen, module = [], Sees()
    torch.export.export(module, (torch.randn(2),), strict=False)
    buffer, parameter, computed, _ = seen[-1]
    assert buffer is module.held and parameter is module.p and computed is None
