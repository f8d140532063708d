"""One model for each runtime: what differs between the files, and what is refused."""

import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from pytorch_quant import INT8_DYNAMIC, QuantDescriptor, calibrate, export_onnx, quantize
from pytorch_quant import nn as quant_nn
from pytorch_quant.export import targets
from pytorch_quant.nn.modes import named_quantizers


class Attention(nn.Module):
    """A convolution, a residual, attention over its pixels and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.conv(x)).relu().flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 3, 6, 6)
    quantize(model, example_inputs=x)
    calibrate(model, [x], progress=False)
    return model, x


@pytest.fixture(scope="module", params=[True, False], ids=["dynamo", "torchscript"])
def files(attention, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("targets")
    paths = {target: folder / f"{target}.onnx" for target in targets.TARGETS}
    options = {"dynamo": request.param}
    reports = [export_onnx(*attention, path, target=t, **options) for t, path in paths.items()]
    for report, target in zip(reports, targets.TARGETS, strict=True):
        assert report.target == target and report.raised_channels == 0
        assert report.quantized_layers == 5 and report.float_layers == ()
    return paths


def test_the_files_of_all_targets_give_the_same_bits(attention, files):
    model, x = attention
    outputs = [onnx_runs.run(path, x.numpy())[0] for path in files.values()]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])
    # A code that flips at a tie moves the output by a step of a late layer at most.
    np.testing.assert_allclose(outputs[0], model(x).detach(), atol=2e-2)


def test_codes_of_activations_and_weights(attention, files):
    count = len(named_quantizers(attention[0]))
    for target, path in files.items():
        file = onnx.load(path)
        assert {o.domain for o in file.opset_import} == {""}
        held = {c.name: c for c in file.graph.initializer}
        quantize_nodes = [n for n in file.graph.node if n.op_type == "QuantizeLinear"]
        zero_points = [held[n.input[2]] for n in quantize_nodes]
        expected = (TensorProto.INT8, 0) if target == "tensorrt" else (TensorProto.UINT8, 128)
        assert {(z.data_type, int(numpy_helper.to_array(z))) for z in zero_points} == {expected}
        dequantize = [n for n in file.graph.node if n.op_type == "DequantizeLinear"]
        weights = [n for n in dequantize if n.input[0] in held]
        assert len(weights) == 5 and len(quantize_nodes) <= count - 5
        assert {held[n.input[0]].data_type for n in weights} == {TensorProto.INT8}
        assert {held[n.input[2]].data_type for n in weights} == {TensorProto.INT8}
        assert all(any(a.name == "axis" for a in n.attribute) for n in weights)
        read = {n.output[0] for n in weights}
        readers = {n.op_type for n in file.graph.node if read & set(n.input)}
        assert readers == {"Conv", "MatMul"} or readers == {"Conv", "MatMul", "Gemm"}
        names = {n.name for n in file.graph.node}
        assert {"stem._input_quantizer/QuantizeLinear", "stem/Conv", "out/MatMul"} <= names
        biases = {"stem.bias", "conv.bias", "qkv.bias", "out.bias", "head.bias"}
        assert {n for n in held if n.endswith("bias")} == biases
        assert {held[n].data_type for n in biases} == {TensorProto.FLOAT}


def test_unsigned_quantizers_are_refused_for_tensorrt_with_all_names(tmp_path):
    model, x = (
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
        torch.rand(3, 8),
    )
    model.append(nn.Linear(8, 4)).eval()
    quantize(model, example_inputs=x, placement="onnxruntime")
    calibrate(model, [x], progress=False)
    unsigned = [n for n, q in named_quantizers(model).items() if q.unsigned]
    assert len(unsigned) >= 2
    with pytest.raises(ValueError, match="no uint8") as error:
        export_onnx(model, x, tmp_path / "m.onnx")
    told = str(error.value)
    assert f"{len(unsigned)} unsigned quantizer(s): {', '.join(unsigned)}. " in told
    assert 'target="onnxruntime" or "openvino"' in told and 'placement="tensorrt"' in told
    assert list(tmp_path.iterdir()) == []
    for target in ("onnxruntime", "openvino"):
        export_onnx(model, x, tmp_path / "m.onnx", target=target)
        graph = onnx.load(tmp_path / "m.onnx").graph
        held = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        for node in (n for n in graph.node if n.op_type == "QuantizeLinear"):
            zero_point = held[node.input[2]]
            name = node.name.removesuffix("/QuantizeLinear")
            assert zero_point.dtype == np.uint8
            assert zero_point == (0 if name in unsigned else 128)
        (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
        np.testing.assert_allclose(got, model(x).detach(), atol=1e-5)


def test_dynamic_quantizers_are_refused_for_tensorrt(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    quantize(model, {nn.Linear: INT8_DYNAMIC}, example_inputs=x, placement="onnxruntime")
    calibrate(model, [x], progress=False)
    told = (
        r"2 dynamic quantizer\(s\): 0\._input_quantizer, 1\._input_quantizer\. .*R12.*onnxruntime"
    )
    with pytest.raises(ValueError, match=told):
        export_onnx(model, x, tmp_path / "m.onnx")
    export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=1e-5)


def test_an_unsigned_quantizer_that_is_disabled_or_not_met_is_no_obstacle(tmp_path):
    unsigned = QuantDescriptor(unsigned=True)
    model = nn.Sequential(quant_nn.QuantLinear(4, 4, quant_desc_input=unsigned))
    x = torch.rand(2, 4)
    calibrate(model, [x], progress=False)
    model[0]._input_quantizer.disable()
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert report.float_quantizers == ["0._input_quantizer"]
    assert (report.quantized_layers, report.weight_only_layers) == (0, 1)


def test_an_unknown_target(tmp_path, attention):
    model, x = attention
    with pytest.raises(ValueError, match="got 'onnx_runtime'; did you mean 'onnxruntime'"):
        export_onnx(model, x, tmp_path / "m.onnx", target="onnx_runtime")
    with pytest.raises(ValueError, match=r"one of tensorrt, onnxruntime, openvino, got 'xyz'$"):
        export_onnx(model, x, tmp_path / "m.onnx", target="xyz")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("flags\t: fpu avx2 avx512_vnni\n", True),
        ("flags\t: fpu avx_vnni\n", True),
        ("flags\t: fpu avx2 avx512bw\n", False),
        ("Features\t: fp asimd\n", None),
        (None, None),
    ],
)
def test_a_note_where_the_cpu_has_no_vnni(tmp_path, monkeypatch, content, expected):
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(targets, "_CPU_INFO", path)
    assert targets.has_vnni() is expected
    notes = targets.machine_notes("onnxruntime")
    assert bool(notes) == (expected is False)
    assert targets.machine_notes("tensorrt") == targets.machine_notes("openvino") == ()
    if notes:
        assert "no VNNI" in notes[0] and "session.x64quantprecision=1" in notes[0]
