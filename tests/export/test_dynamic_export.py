import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pytorch_quant import INT8_DYNAMIC, QuantDescriptor, calibrate, export_onnx
from pytorch_quant import nn as quant_nn
from pytorch_quant.export.dynamic import to_integer_products
from pytorch_quant.export.targets import has_vnni


def linear(inputs, outputs, weight=None, **kwargs):
    weight = weight or INT8_DYNAMIC.weight_for(0)
    desc = {"quant_desc_input": INT8_DYNAMIC.input, "quant_desc_weight": weight}
    return quant_nn.QuantLinear(inputs, outputs, **desc, **kwargs)


class Network(nn.Module):
    """Products of three and of two dimensions, with and without a bias, per row and per tensor."""

    def __init__(self):
        super().__init__()
        self.a = linear(32, 48)
        self.b = linear(48, 40, bias=False)
        self.c = linear(40, 24, QuantDescriptor(8))
        self.d = linear(24, 24, bias=False)
        self.e = linear(24, 8)

    def forward(self, x):
        y = self.c(self.b(self.a(x).relu()))
        return self.e(self.d(y[:, 0])), y


def np_dynamic_codes(x):
    """ONNX DynamicQuantizeLinear: codes without the zero point, and the scale."""
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = np.float32((high - low) / np.float32(255)) or np.float32(1)
    zero_point = np.rint(np.clip(-low / scale, 0, 255))
    return np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point, scale


def np_dynamic(x):
    codes, scale = np_dynamic_codes(x)
    return codes.astype(np.float32) * scale


def file_of(model, args, path, **options):
    report = export_onnx(model, args, path, target="onnxruntime", **options)
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    return report, file


@pytest.fixture
def network():
    model, x = Network().eval(), torch.randn(3, 5, 32)
    calibrate(model, [x], progress=False)
    return model, x


@pytest.mark.parametrize("dynamo", [True, False])
def test_linear_layers_run_as_integer_products(tmp_path, network, dynamo):
    model, x = network
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    path = tmp_path / "m.onnx"
    report, file = file_of(model, x, path, dynamic_shapes=shapes, dynamo=dynamo)
    kinds = [n.op_type for n in file.graph.node]
    assert kinds.count("MatMulInteger") == kinds.count("DynamicQuantizeLinear") == 5
    assert not {"MatMul", "Gemm", "DequantizeLinear", "Transpose"} & set(kinds)
    assert report.integer_weights == report.quantized_layers == 5
    assert report.other_operators == {}
    for batch in (x, torch.randn(6, 5, 32)):
        for optimize in (False, True):
            outputs = onnx_runs.run(path, batch.numpy(), optimize=optimize)
            for got, wanted in zip(outputs, model(batch), strict=True):
                np.testing.assert_allclose(got, wanted.detach(), atol=1e-6)
    options = onnx_runs.ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnx_runs.ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    fused = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert fused.count("DynamicQuantizeMatMul") == 5


def test_float_weights_stay_float(tmp_path, network):
    model, x = network
    report, file = file_of(model, x, tmp_path / "m.onnx", weights="float", dynamo=False)
    assert report.integer_weights == 0
    assert "MatMulInteger" not in {n.op_type for n in file.graph.node}
    for got, wanted in zip(onnx_runs.run(tmp_path / "m.onnx", x.numpy()), model(x), strict=True):
        np.testing.assert_allclose(got, wanted.detach(), atol=1e-6)


def test_tensorrt_is_refused_with_the_reason(tmp_path, network):
    with pytest.raises(ValueError, match=r"a\._input_quantizer.*no DynamicQuantizeLinear \(R12\)"):
        export_onnx(*network, tmp_path / "m.onnx", target="tensorrt")
    assert list(tmp_path.iterdir()) == []


def product_graph(
    codes,
    scale,
    *,
    gemm=None,
    bias=None,
    axis=None,
    zero_point=None,
    shape=(None, None),
    second_reader=False,
):
    """`DQ(DynamicQuantizeLinear(x))` times `DQ(codes)`."""
    zeros = np.zeros(scale.shape, codes.dtype) if zero_point is None else zero_point
    constants = [numpy_helper.from_array(v, n) for v, n in ((codes, "q"), (scale, "s"))]
    constants.append(numpy_helper.from_array(zeros, "z"))
    constants += [] if bias is None else [numpy_helper.from_array(bias, "bias")]
    kept = {} if axis is None else {"axis": axis}
    inputs = ["dx", "dw"] + ([] if bias is None else ["bias"])
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["qx", "sx", "zx"]),
        helper.make_node("DequantizeLinear", ["qx", "sx", "zx"], ["dx"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dw"], **kept),
        helper.make_node("MatMul" if gemm is None else "Gemm", inputs, ["y"], **(gemm or {})),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    if second_reader:
        nodes.append(helper.make_node("Relu", ["dx"], ["r"]))
        outputs.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, shape))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], outputs
    )
    graph.initializer.extend(constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def per_channel(rng, inputs=24, outputs=16):
    codes = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    return codes, (rng.random(outputs) + 0.1).astype(np.float32) / 127


@pytest.mark.parametrize("seed", range(4))
def test_products_equal_numpy(seed):
    rng = np.random.default_rng(seed)
    codes, scale = per_channel(rng)
    bias = rng.standard_normal(16).astype(np.float32)
    x = (rng.standard_normal((7, 24)) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    x += np.float32(rng.integers(-1, 2) * np.abs(x).max())
    q, step = np_dynamic_codes(x)
    sums = q.astype(np.float64) @ codes
    cases = (
        (product_graph(codes, scale, axis=1), sums * scale),
        (product_graph(codes, scale[0]), sums * scale[0]),
        (
            product_graph(codes.T.copy(), scale, axis=0, gemm={"transB": 1}, bias=bias),
            sums * scale + bias / np.float64(step),
        ),
        (product_graph(codes, scale, axis=1, gemm={}), sums * scale),
    )
    for model, expected in cases:
        assert to_integer_products(model.graph) == 1
        onnx.checker.check_model(model, full_check=True)
        assert not [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
        for optimize in (False, True):
            (got,) = onnx_runs.run(model, x, optimize=optimize)
            largest = np.abs(expected * step).max()
            np.testing.assert_allclose(got, expected * step, atol=largest * 1e-6)


def test_the_largest_codes_do_not_saturate():
    if not has_vnni():
        pytest.skip("without VNNI, ONNX Runtime adds pairs of products in 16 bits")
    x = np.full((4, 64), 3.0, np.float32)
    codes = np.full((64, 16), 127, np.int8)
    codes[:, ::2] = -128
    scale = np.linspace(0.01, 0.02, 16, dtype=np.float32)
    model = product_graph(codes, scale, axis=1)
    assert to_integer_products(model.graph) == 1
    (got,) = onnx_runs.run(model, x, optimize=True)
    np.testing.assert_allclose(got, x.astype(float) @ (codes * scale.astype(float)), rtol=1e-6)


def test_others_still_read_the_activation():
    codes, scale = per_channel(np.random.default_rng(0))
    model = product_graph(codes, scale, axis=1, second_reader=True)
    x = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
    before = onnx_runs.run(model, x)
    assert to_integer_products(model.graph) == 1
    for got, wanted in zip(onnx_runs.run(model, x), before, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"axis": 0, "scale": np.ones(16, np.float32)},
        {"axis": 1, "zero_point": np.ones(16, np.int8)},
        {"axis": 1, "codes": np.ones((16, 16), np.uint8)},
        {"axis": 1, "gemm": {"alpha": 0.5}},
        {"axis": 1, "gemm": {"beta": 0.5}, "bias": np.ones(16, np.float32)},
        {"axis": 1, "gemm": {"transA": 1}},
    ],
    ids=["rows", "zero point", "uint8", "alpha", "beta", "transA"],
)
def test_what_is_no_integer_product_stays(change):
    fields = {"codes": np.ones((16, 16), np.int8), "scale": np.ones(16, np.float32), **change}
    model = product_graph(fields.pop("codes"), fields.pop("scale"), **fields)
    before = model.graph.SerializeToString()
    assert to_integer_products(model.graph) == 0
    assert model.graph.SerializeToString() == before


# LSTM


def lstm(*sizes, **kwargs):
    weight = kwargs.pop("weight", INT8_DYNAMIC.weight_for(0))
    desc = {"quant_desc_input": INT8_DYNAMIC.input, "quant_desc_weight": weight}
    return quant_nn.QuantLSTM(*sizes, **desc, **kwargs).eval()


class Recurrent(nn.Module):
    """LSTMs of many kinds, with and without an initial state."""

    def __init__(self):
        super().__init__()
        self.plain = lstm(24, 40)
        self.deep = lstm(24, 16, num_layers=2, bidirectional=True)
        self.first = lstm(24, 16, batch_first=True, bias=False, weight=QuantDescriptor(8))
        self.started = lstm(24, 16, num_layers=2, bidirectional=True)

    def forward(self, x, h, c):
        results = [self.plain(x), self.deep(x), self.first(x), self.started(x, (h, c))]
        return tuple(t for y, (h, c) in results for t in (y, h, c))


@pytest.fixture
def recurrent():
    model = Recurrent().eval()
    args = torch.randn(6, 4, 24), torch.randn(4, 4, 16) / 2, torch.randn(4, 4, 16)
    calibrate(model, [args], progress=False)
    return model, args


def session_of(path):
    # With several threads it ranges h in parts of the batch.
    options = onnx_runs.ort.SessionOptions()
    options.intra_op_num_threads = 1
    return onnx_runs.ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def test_lstms_run_as_one_operator_for_each_layer(tmp_path, recurrent):
    model, args = recurrent
    state = {name: value.clone() for name, value in model.state_dict().items()}
    # Sequences of any length, which an unrolled layer does not take.
    shapes = ({0: torch.export.Dim("time", min=2)}, None, None)
    report, file = file_of(model, args, tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert report.other_operators == {"com.microsoft.DynamicQuantizeLSTM": 6}
    assert "6 com.microsoft.DynamicQuantizeLSTM" in str(report)
    assert report.quantized_layers == 6
    kinds = {n.op_type for n in file.graph.node}
    assert not {"MatMul", "Gemm", "Cast", "Div", "Round", "DynamicQuantizeLinear"} & kinds
    longer = torch.randn(9, 4, 24), *args[1:]
    session = session_of(tmp_path / "m.onnx")
    names = [i.name for i in session.get_inputs()]
    for given in (args, longer):
        outputs = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
        with torch.no_grad():
            expected = model(*given)
        for got, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert not [n for n, _ in model.named_buffers() if "quantized" in n or "zero_point" in n]


def np_lstm(layer, x):
    """One direction of one layer: x ranged over all time steps, h at each one."""
    amax = layer._weight_quantizers[0].amax.numpy()
    weight = torch.cat(layer.all_weights[0][:2], 1).detach().numpy()
    scale = amax / np.float32(127)
    weight = (np.clip(np.rint(weight / scale), -128, 127) * scale).astype(np.float64)
    bias = sum(b.detach().numpy() for b in layer.all_weights[0][2:])
    h = c = np.zeros((x.shape[1], layer.hidden_size), np.float32)
    outputs = []
    for step in np_dynamic(x):
        inputs = np.concatenate((step, np_dynamic(h)), 1)
        i, f, g, o = np.split(inputs @ weight.T + bias, 4, 1)
        i, f, o = (1 / (1 + np.exp(-v)) for v in (i, f, o))
        c = (f * c + i * np.tanh(g)).astype(np.float32)
        h = (o * np.tanh(c)).astype(np.float32)
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("seed", range(3))
def test_the_simulation_equals_numpy(seed):
    torch.manual_seed(seed)
    layer, x = lstm(12, 10), torch.randn(5, 3, 12) * 2
    calibrate(layer, [x], progress=False)
    y, _ = layer(x)
    np.testing.assert_allclose(y.detach(), np_lstm(layer, x.numpy()), atol=1e-6)
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 5, 5])
    unpacked, _ = nn.utils.rnn.pad_packed_sequence(layer(packed)[0])
    torch.testing.assert_close(unpacked, y)


def test_a_cell_is_a_layer_of_one_step():
    layer, x = lstm(12, 10), torch.randn(1, 3, 12)
    state = torch.randn(1, 3, 10), torch.randn(1, 3, 10)
    desc = {"quant_desc_input": INT8_DYNAMIC.input, "quant_desc_weight": INT8_DYNAMIC.weight_for(0)}
    cell = quant_nn.QuantLSTMCell(12, 10, **desc)
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, kind, getattr(layer, f"{kind}_l0"))
    for module, args in ((layer, (x, state)), (cell, (x[0], tuple(s[0] for s in state)))):
        calibrate(module, [args], progress=False)
    _, (h, c) = layer(x, state)
    torch.testing.assert_close(cell(x[0], tuple(s[0] for s in state)), (h[0], c[0]))


def test_elsewhere_a_dynamic_lstm_is_unrolled_in_the_standard_domain(tmp_path):
    layer, x = lstm(12, 10, bidirectional=True), torch.randn(3, 2, 12)
    calibrate(layer, [x], progress=False)
    torch.onnx.export(layer, (x,), tmp_path / "plain.onnx", dynamo=False, opset_version=18)
    report = export_onnx(layer, x, tmp_path / "ov.onnx", target="openvino", dynamo=False)
    assert report.other_operators == {}
    for name in ("plain", "ov"):
        y, h, c = onnx_runs.run(tmp_path / f"{name}.onnx", x.numpy())
        expected, (wanted_h, wanted_c) = layer(x)
        for got, wanted in ((y, expected), (h, wanted_h), (c, wanted_c)):
            np.testing.assert_allclose(got, wanted.detach(), atol=1e-6)


def test_a_quarter_of_the_size(tmp_path):
    layer, x = lstm(128, 256), torch.randn(2, 1, 128)
    calibrate(layer, [x], progress=False)
    report, file = file_of(layer, x, tmp_path / "m.onnx")
    assert 0.25 < report.size / (4 * sum(p.numel() for p in layer.parameters())) < 0.27
    assert "weight_ih_l0_quantized" in {c.name for c in file.graph.initializer}


def mixed(layer):
    layer._input_quantizers[1].disable()


def wide(layer):
    layer._weight_quantizers[0].num_bits = 16


def off(layer):
    layer._weight_quantizers[0].disable()


def scaled(layer):
    layer._input_quantizers[0].pre_quant_scale = torch.ones(18)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("kwargs", "spoil", "message"),
    [
        ({"proj_size": 4}, None, "has no projection, and it has proj_size=4; use a static scheme"),
        ({"num_layers": 2}, mixed, "some of its input quantizers are dynamic and others are not"),
        ({}, wide, "_weight_quantizers.0: 16-bit codes have no Q/DQ form"),
        ({}, off, "its weights are float; enable their quantizers"),
        ({}, scaled, "DynamicQuantizeLSTM has no pre_quant_scale"),
        ({"dtype": torch.float16}, None, r"takes float32 alone; export model.float\(\)"),
    ],
)
def test_lstms_without_a_form_are_named(tmp_path, kwargs, spoil, message):
    model = nn.Sequential(lstm(8, 10, **kwargs))
    x = torch.randn(2, 3, 8, dtype=kwargs.get("dtype"))
    calibrate(model, [x], progress=False)
    if spoil is not None:
        spoil(model[0])
    with pytest.raises(ValueError, match=rf"^0.*{message}"):
        export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    assert list(tmp_path.iterdir()) == []
