"""A plain `torch.onnx.export` of a quantized model, by both exporters."""

import numpy as np
import onnx
import onnx_runs
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from pytorch_quant import (
    INT8,
    QuantDescriptor,
    TensorQuantizer,
    calibrate,
    export_onnx,
    quant_modules,
    quantize,
)
from pytorch_quant import nn as quant_nn
from pytorch_quant.nn.modes import named_quantizers

EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def network():
    with quant_modules.initialize():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        ).eval()


def export(model, x, path, dynamo, **options):
    options |= {"verbose": False} if dynamo else {}
    with torch.no_grad():
        torch.onnx.export(model.eval(), (x,), path, dynamo=dynamo, **options)
    return onnx.load(path)


def constants(graph):
    values = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return values


@EXPORTERS
def test_standard_nodes_with_scales_axes_and_float_weights(tmp_path, dynamo):
    model, x = network(), torch.randn(2, 3, 8, 8)
    calibrate(model, [x], progress=False)
    file = export(model, x, tmp_path / "m.onnx", dynamo)
    onnx.checker.check_model(file)
    assert {o.domain for o in file.opset_import} == {""}
    graph, values = file.graph, constants(file.graph)
    names = {"0.weight": 0, "2.weight": 1, "5.weight": 0}
    quantize = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantize) == len(named_quantizers(model)) == 7
    for node in quantize:
        (back,) = [n for n in graph.node if node.output[0] in n.input]
        assert back.op_type == "DequantizeLinear"
        assert list(back.input[1:]) == list(node.input[1:]) or all(
            np.array_equal(values[a], values[b])
            for a, b in zip(back.input[1:], node.input[1:], strict=True)
        )
        scale, zero_point = values[node.input[1]], values[node.input[2]]
        assert zero_point.dtype == np.int8 and not zero_point.any()
        axis = [a.i for a in node.attribute if a.name == "axis"]
        if node.input[0] in names:
            assert axis == [names[node.input[0]]]
            layer = model[int(node.input[0][0])]
            np.testing.assert_array_equal(scale, layer._weight_quantizer.scale.flatten())
            np.testing.assert_array_equal(values[node.input[0]], layer.weight.detach())
        else:
            assert scale.shape == ()
    assert quantize[0].input[0] == graph.input[0].name
    shown = {n.input[0] for n in quantize}
    assert set(names) <= shown


@EXPORTERS
@pytest.mark.parametrize("opset", [None, 18, 21])
def test_runs_as_it_was_simulated(tmp_path, dynamo, opset):
    if opset == 21 and not dynamo:
        pytest.skip("the TorchScript exporter ends at opset 20")
    model, x = network(), torch.randn(2, 3, 8, 8)
    calibrate(model, [x], progress=False)
    export(model, x, tmp_path / "m.onnx", dynamo, opset_version=opset)
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=1e-6)


FORMATS = [
    {"num_bits": 4},
    {"num_bits": 2},
    {"narrow_range": True},
    {"num_bits": (4, 3)},
    {"num_bits": 8, "unsigned": True},
    {"num_bits": 5, "unsigned": True},
    {"dynamic": True},
    {"scale_amax": 0.5},
    {"learn_amax": True},
]


@EXPORTERS
@pytest.mark.parametrize("fields", FORMATS, ids=str)
def test_every_format_runs_as_it_was_simulated(tmp_path, dynamo, fields):
    desc = QuantDescriptor(**fields)
    per_channel = not (fields.get("dynamic") or fields.get("learn_amax") or desc.unsigned)
    weight = desc.replace(axis=0) if per_channel else QuantDescriptor(axis=0)
    model = nn.Sequential(
        quant_nn.QuantLinear(16, 8, quant_desc_input=desc, quant_desc_weight=weight)
    )
    x = torch.rand(5, 16)
    calibrate(model, [x], progress=False)
    # Values beyond the range have to saturate the same way.
    x = torch.cat([x, x * 3, -x])
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    # FP8 codes came with opset 19, which is above the default of the oldest torch.
    options = {"opset_version": 19} if desc.num_bits == (4, 3) else {}
    export(model, x, tmp_path / "m.onnx", dynamo, **options)
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=2e-6)


@EXPORTERS
@pytest.mark.parametrize("opset", [13, pytest.param(19, marks=onnx_runs.needs_half)])
def test_half_precision(tmp_path, dynamo, opset):
    if dynamo and opset == 13:
        pytest.skip("that exporter does not write opset 13 itself")
    model, x = network(), torch.randn(2, 3, 8, 8)
    calibrate(model, [x], progress=False)
    model.half()
    file = export(model, x.half(), tmp_path / "m.onnx", dynamo, opset_version=opset)
    values = constants(file.graph)
    kinds = {values[n.input[1]].dtype for n in file.graph.node if n.op_type == "QuantizeLinear"}
    assert kinds == {np.dtype(np.float16 if opset == 19 else np.float32)}
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.half().numpy())
    np.testing.assert_allclose(got, model(x.half()).detach(), atol=2e-3)


@EXPORTERS
def test_dynamic_batch(tmp_path, dynamo):
    model, x = network(), torch.randn(2, 3, 8, 8)
    calibrate(model, [x], progress=False)
    options = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        if dynamo
        else {"dynamic_axes": {"x": {0: "batch"}}, "input_names": ["x"]}
    )
    export(model, x, tmp_path / "m.onnx", dynamo, **options)
    other = torch.randn(7, 3, 8, 8)
    (got,) = onnx_runs.run(tmp_path / "m.onnx", other.numpy())
    np.testing.assert_allclose(got, model(other).detach(), atol=1e-6)


@EXPORTERS
def test_an_uncalibrated_model_names_every_quantizer_and_writes_no_file(tmp_path, dynamo):
    model, x = network(), torch.randn(2, 3, 8, 8)
    calibrate(model[:3], [x], progress=False)
    names = "3._input_quantizer, 5._input_quantizer, 5._weight_quantizer"
    with pytest.raises(Exception) as error:
        export(model, x, tmp_path / "m.onnx", dynamo)
    told, cause = [], error.value
    while cause is not None:
        told.append(str(cause))
        cause = cause.__cause__
    assert any(f"3 uncalibrated quantizer(s): {names}. Calibrate them" in text for text in told)
    assert list(tmp_path.iterdir()) == []


@EXPORTERS
def test_an_uncalibrated_model_with_torchs_fake_quantize_exports(tmp_path, dynamo, monkeypatch):
    monkeypatch.setattr(quant_nn.TensorQuantizer, "use_fb_fake_quant", True)
    model, x = network(), torch.randn(2, 3, 8, 8)
    file = export(model, x, tmp_path / "m.onnx", dynamo)
    assert sum(n.op_type == "QuantizeLinear" for n in file.graph.node) == 7
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=0.02)


def test_a_torch_export_of_an_uncalibrated_model_is_refused():
    with pytest.raises(RuntimeError, match="7 uncalibrated"):
        torch.export.export(network(), (torch.randn(2, 3, 8, 8),))


@EXPORTERS
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 16}, "_input_quantizer: 16-bit codes have no Q/DQ form"),
        ({"num_bits": (2, 1)}, "_input_quantizer: e2m1 has no Q/DQ form"),
        ({"axis": 1, "block_size": 4}, "_input_quantizer: a block quantizer has no form"),
        ({"axis": (0, 1)}, "_input_quantizer: ONNX keeps one axis at most"),
    ],
)
def test_what_has_no_onnx_form_says_so(tmp_path, dynamo, fields, message):
    model = nn.Sequential(quant_nn.QuantLinear(8, 8, quant_desc_input=QuantDescriptor(**fields)))
    x = torch.randn(2, 8)
    calibrate(model, [x], progress=False)
    with pytest.raises(Exception) as error:
        export(model, x, tmp_path / "m.onnx", dynamo)
    told, cause = "", error.value
    while cause is not None:
        told, cause = told + str(cause), cause.__cause__
    assert message in told


@EXPORTERS
def test_a_dead_channel_gets_a_positive_scale(tmp_path, dynamo):
    model = nn.Sequential(quant_nn.QuantLinear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
    x = torch.randn(2, 4)
    calibrate(model, [x], progress=False)
    file = export(model, x, tmp_path / "m.onnx", dynamo)
    values = constants(file.graph)
    (weight,) = [
        n for n in file.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "0.weight"
    ]
    scale = values[weight.input[1]]
    assert scale[1] == scale.max() > 0
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=1e-6)


@EXPORTERS
@pytest.mark.parametrize("bad", [0.0, torch.nan])
def test_an_activation_without_a_range_is_refused(tmp_path, dynamo, bad):
    model, x = nn.Sequential(quant_nn.QuantLinear(4, 4)), torch.randn(2, 4)
    calibrate(model, [x], progress=False)
    model[0]._input_quantizer._amax.fill_(bad)
    # The current exporter puts the error into one of its own.
    with pytest.raises(Exception, match=r"0\._input_quantizer: amax is (0|nan), from which no sc"):
        export(model, x, tmp_path / "m.onnx", dynamo)
    assert not (tmp_path / "m.onnx").exists()


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x):
        x = torch.relu(self.a(x))
        return x + self.c(torch.relu(self.b(x)))


@pytest.mark.parametrize("plain", [False, True])
def test_two_quantizers_below_8_bits_on_one_tensor(plain, tmp_path):
    # Each has a clip of its own, and the exporter's optimizer names bounds after the tensor.
    model, x = TwoReaders().eval(), torch.randn(2, 16, 8, 8)
    quantize(model, {"": INT8}, example_inputs=x)
    for i, quantizer in enumerate(q for q in model.modules() if isinstance(q, TensorQuantizer)):
        quantizer.num_bits = 4 + i % 3
    calibrate(model, [x], progress=False)
    path = tmp_path / "model.onnx"
    if plain:
        torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
    else:
        export_onnx(model, x, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-5, atol=1e-5)
