import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import pytorch_quant as pq
from pytorch_quant import calibrate, export_onnx, quant_modules, verify_onnx
from pytorch_quant import nn as quant_nn
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.export import verify
from pytorch_quant.export.verify_report import compare

RUNTIME = ("onnxruntime",)


class Network(nn.Module):
    """A residual add, a concat, batch norm, a linear layer on three axes, and attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True))
        self.mix = nn.Conv2d(32, 16, 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x):
        a = torch.relu(self.norm(self.stem(x)))
        b = torch.relu(self.body(a) + a)
        t = self.mix(torch.cat([a, b], 1)).flatten(2).transpose(1, 2)
        t = t + self.attention(t, t, t, need_weights=False)[0]
        h = torch.nn.functional.gelu(self.hidden(t))
        return self.head(h).mean(1), h


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(2, 3, 6, 6)
    rules = {nn.Conv2d: pq.INT8, nn.Linear: pq.INT8}
    model = pq.quantize(model, rules, example_inputs=(x,))
    for layer in (model.stem, model.mix, model.hidden):
        assert any(isinstance(part, pq.TensorQuantizer) for part in layer.modules())
    calibrate(model, [x], progress=False)
    path = tmp_path_factory.mktemp("verify") / "network.onnx"
    export_onnx(model, x, path, target="onnxruntime")
    return model, x, path


def changed(path, tmp_path, change):
    file = onnx.load(path)
    change(file.graph, {c.name: c for c in file.graph.initializer})
    onnx.save(file, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def put(constant, array):
    constant.CopyFrom(numpy_helper.from_array(array, constant.name))


def test_a_right_file_is_ok_in_every_engine(network):
    model, x, path = network
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    report = verify_onnx(path, model, x, progress=False)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    model.eval()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert report.ok and report.first_divergence is None and not report.unmatched, str(report)
    assert {row.engine for row in report.rows} >= {
        "layer by layer",
        "ONNX Runtime",
        "ONNX Runtime, optimized",
        "onnx.reference",
    }
    kinds = [n.op_type for n in onnx.load(path).graph.node]
    assert report.quantizers == kinds.count("QuantizeLinear")
    assert report.weights == kinds.count("DequantizeLinear") - report.quantizers
    assert all(row.cosine > 0.999 and row.sqnr > 20 for row in report.rows)
    text = str(report)
    assert "network.onnx: ok" in text and "onnx.reference" in text and "SQNR dB" in text


def test_a_tampered_scale_is_found(network, tmp_path):
    model, x, path = network

    def change(graph, constants):
        node = next(n for n in graph.node if n.name == "mix._weight_quantizer/DequantizeLinear")
        scale = constants[node.input[1]]
        array = numpy_helper.to_array(scale).copy()
        array[3] *= 1.02
        put(scale, array)

    report = verify_onnx(changed(path, tmp_path, change), model, x, engines=RUNTIME)
    assert not report.ok
    assert report.first_divergence.layer == "mix"
    assert report.first_divergence.node == "mix._weight_quantizer/DequantizeLinear"
    assert "NOT what torch computes" in str(report) and "layer mix, node" in str(report)


def test_a_tampered_activation_scale_is_found(network, tmp_path):
    model, x, path = network

    def change(graph, constants):
        names = ("QuantizeLinear", "DequantizeLinear")
        name = next(n for n in graph.node if n.name == f"hidden._input_quantizer/{names[0]}")
        new = numpy_helper.from_array(np.float32(1.01) * value(constants, name.input[1]), "new")
        graph.initializer.append(new)
        for node in graph.node:
            if node.name in [f"hidden._input_quantizer/{kind}" for kind in names]:
                node.input[1] = "new"

    report = verify_onnx(changed(path, tmp_path, change), model, x, engines=RUNTIME)
    assert report.first_divergence.layer == "hidden"
    assert "codes differ" in report.first_divergence.problem


def value(constants, name):
    return numpy_helper.to_array(constants[name])


def test_one_tampered_weight_code_is_found(network, tmp_path):
    model, x, path = network

    def change(graph, constants):
        node = next(n for n in graph.node if n.name == "body.0._weight_quantizer/DequantizeLinear")
        codes = value(constants, node.input[0]).copy()
        codes[5, 2, 1, 1] += 1 if codes[5, 2, 1, 1] < 100 else -1
        put(constants[node.input[0]], codes)

    report = verify_onnx(changed(path, tmp_path, change), model, x, engines=RUNTIME)
    assert report.first_divergence.layer == "body.0"
    assert report.first_divergence.problem.startswith("body.0._weight_quantizer: 1 of ")


@pytest.mark.parametrize("layer", ["stem", "mix", "hidden", "head"])
def test_a_changed_bias_is_found(network, tmp_path, layer):
    model, x, path = network

    def change(graph, constants):
        bias = constants[f"{layer}.bias"]
        array = numpy_helper.to_array(bias).copy()
        array.reshape(-1)[1] += 0.05
        put(bias, array)

    report = verify_onnx(changed(path, tmp_path, change), model, x, engines=RUNTIME)
    assert report.first_divergence.layer == layer, str(report)
    found = report.first_divergence.node
    node = next(n for n in onnx.load(path).graph.node if n.name == found)
    assert f"{layer}.bias" in node.input


def test_an_operator_that_is_left_out_is_found(network, tmp_path):
    model, x, path = network

    def change(graph, constants):
        relu = next(n for n in graph.node if n.op_type == "Relu")
        relu.op_type = "Identity"

    report = verify_onnx(changed(path, tmp_path, change), model, x, engines=RUNTIME)
    assert report.first_divergence.engine == "layer by layer"
    assert "computed from torch's own tensors" in report.first_divergence.problem


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_files_of_a_plain_export(network, tmp_path, dynamo):
    model, x, _ = network
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=dynamo, verbose=False)
    report = verify_onnx(tmp_path / "m.onnx", model, x, engines=RUNTIME)
    assert report.ok and not report.unmatched, str(report)


def small(**fields):
    desc = QuantDescriptor(**fields)
    return nn.Sequential(
        quant_nn.QuantLinear(12, 8, quant_desc_input=desc, quant_desc_weight=desc),
        nn.ReLU(),
        quant_nn.QuantLinear(8, 8, quant_desc_input=desc, quant_desc_weight=desc),
    )


@pytest.mark.parametrize(
    "fields", [{}, {"num_bits": 4}, {"num_bits": (4, 3)}, {"narrow_range": True}], ids=str
)
def test_every_format(tmp_path, fields):
    model, x = small(**fields), torch.randn(64, 12)
    calibrate(model, [x], progress=False)
    export_onnx(model, x, tmp_path / "m.onnx")
    # Values beyond the range that was calibrated saturate.
    report = verify_onnx(tmp_path / "m.onnx", model, 1.5 * x)
    assert report.ok and report.quantizers == report.weights == 2, str(report)


def test_half_precision(tmp_path):
    model, x = small(), torch.randn(16, 12)
    calibrate(model, [x], progress=False)
    export_onnx(model.half(), x.half(), tmp_path / "half.onnx")
    report = verify_onnx(tmp_path / "half.onnx", model, x.half(), engines=RUNTIME)
    assert report.ok, str(report)
    export_onnx(model.bfloat16(), x.bfloat16(), tmp_path / "bfloat16.onnx")
    report = verify_onnx(tmp_path / "bfloat16.onnx", model, x.bfloat16())
    assert report.ok and report.not_run["ONNX Runtime"] == "takes no bfloat16 arrays", str(report)


def test_a_code_on_a_tie_may_differ_and_one_off_a_tie_may_not(tmp_path):
    model, x = nn.Sequential(quant_nn.QuantLinear(4, 4)), torch.tensor([[1.0, 2.0, 3.0, 127.0]])
    calibrate(model, [x], progress=False)
    export_onnx(model, x, tmp_path / "m.onnx")
    file = onnx.load(tmp_path / "m.onnx")
    quantize = next(n for n in file.graph.node if n.op_type == "QuantizeLinear")
    scale = numpy_helper.from_array(np.float32(1.0003), "other")
    file.graph.initializer.append(scale)
    quantize.input[1] = "other"
    onnx.save(file, tmp_path / "m.onnx")
    # The code of 0.5001 is 1 in torch, and 0 in the file.
    x = torch.tensor([[0.5001, 1.0, 2.0, 3.0]])
    on_tie = verify_onnx(tmp_path / "m.onnx", model, x, engines=())
    assert on_tie.ok and on_tie.ties == 1 and "1 code(s) one step apart" in str(on_tie)
    # That of 100.51 is 101 and 100.
    x[0, 0] = 100.51
    off_tie = verify_onnx(tmp_path / "m.onnx", model, x, engines=())
    assert off_tie.ties == 0 and off_tie.first_divergence.problem == (
        "0._input_quantizer: 1 of 4 codes differ, by up to 1 steps, for torch's own input"
    )


def test_a_dynamic_quantizer(tmp_path):
    model = nn.Sequential(
        quant_nn.QuantLinear(12, 8, quant_desc_input=QuantDescriptor(dynamic=True))
    )
    x = torch.randn(16, 12)
    calibrate(model, [x], progress=False)
    export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    report = verify_onnx(tmp_path / "m.onnx", model, x, engines=RUNTIME)
    assert report.ok, str(report)


def test_an_engine_that_computes_something_else_is_bisected(network, monkeypatch):
    model, x, path = network
    from pytorch_quant.export import engines

    run = engines._OnnxRuntime._run

    def wrong(self, tensors):
        results = run(self, tensors)
        late = {"MatMul", "Gemm"} & {n.op_type for n in self.proto.graph.node}
        return [-r for r in results] if self.optimized and late else results

    start = engines._OnnxRuntime.__init__

    def keep(self, model, threads, optimize):
        self.proto, self.optimized = model, optimize
        start(self, model, threads, optimize)

    monkeypatch.setattr(engines._OnnxRuntime, "_run", wrong)
    monkeypatch.setattr(engines._OnnxRuntime, "__init__", keep)
    report = verify_onnx(path, model, x, engines=RUNTIME)
    assert not report.ok
    assert report.first_divergence.engine == "ONNX Runtime, optimized"
    products = [n.name for n in onnx.load(path).graph.node if n.op_type in ("MatMul", "Gemm")]
    assert report.first_divergence.node == products[0]
    assert report.first_divergence.layer.startswith("attention")
    assert "too far from it in ONNX Runtime, optimized" in str(report)


def test_without_onnxruntime_the_reference_finds_what_is_wrong(network, tmp_path, monkeypatch):
    model, x, path = network
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = verify_onnx(path, model, x, engines=["reference"])
    assert report.ok and report.rows[0].engine == "layer by layer", str(report)

    def change(graph, constants):
        node = next(n for n in graph.node if n.name == "mix._weight_quantizer/DequantizeLinear")
        put(constants[node.input[1]], 1.1 * value(constants, node.input[1]))

    report = verify_onnx(changed(path, tmp_path, change), model, x, engines=())
    assert report.first_divergence.layer == "mix" and not report.ok


def test_without_onnxruntime_an_engine_is_bisected(network, monkeypatch):
    model, x, path = network
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    from pytorch_quant.export import engines

    run = engines._Reference._run

    def wrong(self, tensors):
        results = run(self, tensors)
        cut = any("::" in port.name for port in self.inputs)
        return results if cut else [-r for r in results]

    monkeypatch.setattr(engines._Reference, "_run", wrong)
    report = verify_onnx(path, model, x, engines=["reference"])
    assert report.first_divergence.engine == "onnx.reference" and not report.ok
    assert report.first_divergence.layer == "stem"


def test_without_onnxruntime_a_large_graph_wants_a_decision(network, monkeypatch):
    model, x, path = network
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(verify, "_REFERENCE_NODES", 1)
    for options in ({}, {"engines": ()}):
        with pytest.raises(ImportError, match=r"\[onnxruntime\].*Or pass reference=True"):
            verify_onnx(path, model, x, **options)
    assert verify_onnx(path, model, x, engines=["reference"]).ok
    assert verify_onnx(path, model, x, engines=(), reference=True).ok


def test_without_onnxruntime_its_own_operators_do_not_run(tmp_path, monkeypatch):
    model, x = nn.Sequential(nn.LSTM(8, 8)).eval(), torch.randn(3, 2, 8)
    rules = {nn.LSTM: pq.INT8_DYNAMIC}
    model = pq.quantize(model, rules, example_inputs=x, placement="onnxruntime")
    pq.compute_amax(model, "max")
    export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"onnx\.reference cannot.*ONNX Runtime may, install"):
        verify_onnx(tmp_path / "m.onnx", model, x)


def test_what_is_no_onnx_file(network, tmp_path):
    model, x, path = network
    with pytest.raises(FileNotFoundError):
        verify_onnx(tmp_path / "none.onnx", model, x)
    (tmp_path / "text.onnx").write_text("this is no model")
    with pytest.raises(ValueError, match=r"text\.onnx is not an ONNX file"):
        verify_onnx(tmp_path / "text.onnx", model, x)
    content = path.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.onnx is not an ONNX file"):
        verify_onnx(tmp_path / "cut.onnx", model, x)


def test_external_data_that_is_missing(network, tmp_path):
    model, x, path = network
    file = onnx.load(path)
    options = {"save_as_external_data": True, "location": "m.data", "size_threshold": 0}
    onnx.save(file, tmp_path / "m.onnx", **options)
    assert verify_onnx(tmp_path / "m.onnx", model, x, engines=RUNTIME).ok
    content = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"m\.data"):
        verify_onnx(tmp_path / "m.onnx", model, x)
    (tmp_path / "m.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.data does not exist"):
        verify_onnx(tmp_path / "m.onnx", model, x)


def test_arguments_that_do_not_fit(network):
    model, x, path = network
    with pytest.raises(ValueError, match=r"takes 1 input\(s\), 'x' .*; got 2 tensor"):
        verify_onnx(path, model, (x, x))
    with pytest.raises(ValueError, match=r"\(2, 3, 6, 6\)\), got shape \(1, 3, 6, 6\)"):
        verify_onnx(path, model, x[:1])
    with pytest.raises(TypeError, match=r"got torch\.float64; convert it"):
        verify_onnx(path, model, x.double())
    with pytest.raises(TypeError, match="args is a tensor, a tuple of arguments or a dict"):
        verify_onnx(path, model, "x")
    with pytest.raises(ValueError, match="engine must be one of onnxruntime, "):
        verify_onnx(path, model, x, engines=["ort"])


def test_a_model_that_the_file_does_not_come_from(network):
    _, x, path = network
    with pytest.raises(ValueError, match="Network has no enabled quantizer"):
        verify_onnx(path, Network(), x)
    with quant_modules.initialize():
        other = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    calibrate(other, [x], progress=False)
    with pytest.raises(ValueError, match=r"has 2 output\(s\).* returns 1 tensor"):
        verify_onnx(path, other, x)


def test_a_file_without_quantizers_is_not_this_model(network, tmp_path):
    model, x, _ = network
    export_onnx(Network().eval(), x, tmp_path / "float.onnx")
    with pytest.raises(ValueError, match=r"no Q/DQ pair of .* belongs to a quantizer of Network"):
        verify_onnx(tmp_path / "float.onnx", model, x)


def test_measures_against_numpy():
    a, b = np.random.default_rng(0).normal(size=(2, 100))
    error, cosine, sqnr = compare(torch.from_numpy(a), torch.from_numpy(b))
    assert error == pytest.approx(np.abs(a - b).max())
    assert cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert sqnr == pytest.approx(10 * np.log10((a @ a) / ((a - b) @ (a - b))))
    same = torch.tensor([1.0, torch.nan, torch.inf])
    assert compare(same, same.clone()) == (0.0, 1.0, np.inf)
    assert compare(same, torch.ones(3))[2] == -np.inf


def test_types_of_ports():
    from pytorch_quant.export.ports import onnx_type, torch_dtype

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn):
        assert torch_dtype(onnx_type(dtype)) == dtype
    assert torch_dtype(TensorProto.STRING) is None
    with pytest.raises(ValueError, match="ONNX has no type for"):
        onnx_type(torch.qint8)
