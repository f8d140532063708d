import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pytorch_quant import FP8, INT8_DYNAMIC, calibrate, export_onnx, quantize
from pytorch_quant.export.engines import open_session
from pytorch_quant.export.fix import fix_onnx
from pytorch_quant.export.predict import Prediction, Row, predict_int8


def conv(cin, cout, size=3, groups=1, act=nn.ReLU):
    layers = [nn.Conv2d(cin, cout, size, padding=size // 2, groups=groups), act()]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a = conv(3, 16), conv(16, 16)
        self.b, self.pool = nn.Conv2d(16, 16, 3, padding=1), nn.MaxPool2d(2)
        self.fc = nn.Linear(16, 8)

    def forward(self, x):
        x = self.stem(x)
        x = self.pool(torch.relu(x + self.b(self.a(x))))
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.pool = conv(3, 16), conv(3, 16, 1), nn.AvgPool2d(2)
        self.c, self.up = conv(32, 16, 1), nn.ConvTranspose2d(16, 16, 2, 2)

    def forward(self, x):
        x = self.c(self.pool(torch.cat([self.a(x), self.b(x)], 1)))
        return torch.relu(self.up(x * torch.sigmoid(x)))


class MobileNetBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16, act=nn.ReLU6)
        self.up, self.dw = conv(16, 64, 1, act=nn.ReLU6), conv(64, 64, 3, 64, nn.ReLU6)
        self.down, self.head = nn.Conv2d(64, 16, 1), conv(16, 32, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.stem(x)
        return self.pool(self.head(x + self.down(self.dw(self.up(x)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.v, self.out = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        def heads(y):
            return y.unflatten(-1, (4, 8)).transpose(1, 2)

        h = self.norm(x)
        scores = heads(self.q(h)) @ heads(self.k(h)).transpose(-1, -2) / 8**0.5
        mixed = torch.softmax(scores, -1) @ heads(self.v(h))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


MODELS = {
    "residual": Residual,
    "concat": Concat,
    "mobilenet": MobileNetBlock,
    "attention": Attention,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Files by model and placement, as exported and repaired for a runtime."""
    made = {}

    def get(name, placement, form="exported"):
        if (name, placement) not in made:
            torch.manual_seed(0)
            x = torch.randn((2, 5, 32) if name == "attention" else (2, 3, 16, 16))
            model = quantize(MODELS[name]().eval(), example_inputs=x, placement=placement)
            calibrate(model, [x], progress=False)
            made[name, placement] = tmp_path_factory.mktemp(name) / f"{placement}.onnx"
            # uint8 quantizers of other placements are refused for TensorRT.
            export_onnx(model, x, made[name, placement], target=placement)
        path = made[name, placement]
        if form == "exported":
            return path
        fix_onnx(path, path.with_name(f"{placement}_{form}.onnx"), target=form)
        return path.with_name(f"{placement}_{form}.onnx")

    return get


INTEGER = {
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "QLinearAdd",
    "QLinearMul",
    "QLinearAveragePool",
    "QLinearGlobalAveragePool",
    "QLinearConcat",
}


def ran_on_integers(path, prediction):
    """What ONNX Runtime made of each node, in the graph that it saves behind its optimizer."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    producers = {o: n for n in graph.node for o in n.output}
    found = {}
    for node in graph.node:
        # A MatMul that became a Gemm with the Add behind it is named after both.
        name = node.name.removesuffix("/MatMulAddFusion").split("/MatMulScaleFusion")[0]
        found[name] = node.op_type in INTEGER
        if node.op_type == "MaxPool":
            source = producers[node.input[0]].op_type
            found[name] = source == "QuantizeLinear" or source in INTEGER
    # What is fused into another operator, such as x * sigmoid(x), is in float.
    return {row.node: found.get(row.node, False) for row in prediction.rows}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["exported", "onnxruntime"])
@pytest.mark.parametrize("placement", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_does_as_predicted(exported, name, placement, form):
    path = exported(name, placement, form)
    prediction = predict_int8(path, "onnxruntime")
    assert {r.node: r.int8 for r in prediction.rows} == ran_on_integers(path, prediction)


@pytest.mark.slow
def test_onnx_runtime_runs_most_of_what_is_placed_for_it(exported):
    for name in MODELS:
        path = exported(name, "onnxruntime", "onnxruntime")
        assert predict_int8(path, "onnxruntime").share > 0.7, name


def ran_in_openvino(path, names):
    ov = pytest.importorskip("openvino")
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = {}
    for op in compiled.get_runtime_model().get_ops():
        info = {k: str(v.astype(str)) for k, v in op.get_rt_info().items() if hasattr(v, "astype")}
        for made in info.get("originalLayersNames", "").split(","):
            for name in names:
                # Its passes add to the name, such as /WithoutBiases.
                if made == name or made.startswith(f"{name}/"):
                    found[name] = info["runtimePrecision"] in ("i8", "u8")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["exported", "openvino"])
@pytest.mark.parametrize("placement", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", MODELS)
def test_openvino_does_as_predicted(exported, name, placement, form):
    path = exported(name, placement, form)
    rows = [r for r in predict_int8(path, "openvino").rows if r.op not in ("Add", "Mul")]
    ran = ran_in_openvino(path, [r.node for r in rows])
    assert len(rows) > 3
    # Attention is one fused operator, named after some of its parts.
    missing = [r for r in rows if r.node not in ran]
    assert [r for r in missing if r.int8 and r.op != "MatMul"] == []
    kept = [r for r in rows if r not in missing]
    assert {r.node: r.int8 for r in kept} == {r.node: ran[r.node] for r in kept}


def test_tensorrt_and_its_residual(exported):
    rows = {r.node: r for r in predict_int8(exported("residual", "tensorrt")).rows}
    (add,) = [r for r in rows.values() if r.op == "Add"]
    assert add.int8 and add.reason.startswith("fused into b/Conv")
    assert all(r.int8 for r in rows.values() if r.op == "Conv")


def small(nodes, constants=None, shape=(1, 16, 8, 8)):
    held = {"s": np.float32(0.5), "z": np.int8(0), "u": np.uint8(0), "ws": np.float32(0.01)}
    held["w"] = np.ones((16, 16, 3, 3), np.int8)
    held |= constants or {}
    head = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "z"], ["wd"]),
    ]
    graph = helper.make_graph(
        [*head, *nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def op(kind, inputs, output="y", **attributes):
    return helper.make_node(kind, inputs, [output], name=kind, **attributes)


Q = [
    helper.make_node("QuantizeLinear", ["t", "s", "z"], ["tq"]),
    helper.make_node("DequantizeLinear", ["tq", "s", "z"], ["y"]),
]
FLOAT_W = {"wf": np.ones((16, 16, 3, 3), np.float32)}
CASES = {
    "conv": ([op("Conv", ["d", "wd"])], True, "both operands come from a DQ"),
    "float weight": ([op("Conv", ["d", "wf"])], False, "its weight comes from no DQ"),
    "float data": ([op("Conv", ["x", "wd"])], False, "its data comes from no DQ"),
    "all float": ([op("Conv", ["x", "wf"])], False, "its data and its weight come from no DQ"),
    "one factor": ([op("MatMul", ["d", "x"])], False, "input 1 comes from no DQ"),
    "pool": ([op("GlobalAveragePool", ["d"], "t"), *Q], True, "DQ before it, Q behind it"),
    "pool without Q": ([op("GlobalAveragePool", ["d"])], False, "no Q behind it"),
    "pool without DQ": ([op("GlobalAveragePool", ["x"], "t"), *Q], False, "no DQ before it"),
    "add": ([op("Add", ["d", "d"], "t"), *Q], True, "DQ before both inputs, Q behind it"),
    "add without Q": ([op("Add", ["d", "d"])], False, "no Q behind it"),
    "add of floats": ([op("Add", ["d", "x"], "t"), *Q], False, "an input comes from no DQ, and it"),
    "concat": ([op("Concat", ["d", "d"], axis=1)], True, "all inputs come from a DQ"),
    "concat before Q": (
        [op("Concat", ["x", "d"], "t", axis=1), *Q],
        True,
        "the Q behind it moves to its inputs",
    ),
    "concat of floats": ([op("Concat", ["x", "d"], axis=1)], False, "an input comes from no DQ"),
    "max pool": ([op("MaxPool", ["d"], kernel_shape=[2, 2])], True, "it keeps the grid"),
    "float max pool": (
        [op("MaxPool", ["x"], kernel_shape=[2, 2])],
        False,
        "no DQ before it and no",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tensorrt(name):
    nodes, runs, reason = CASES[name]
    (row,) = predict_int8(small(nodes, FLOAT_W)).rows
    assert (row.node, row.int8) == (nodes[0].name, runs)
    assert row.reason.startswith(reason)


def test_tensorrt_takes_no_uint8():
    model = small(
        [op("Conv", ["d", "wd"])], {"z": np.uint8(0), "w": np.ones((1, 16, 1, 1), np.uint8)}
    )
    (row,) = predict_int8(model).rows
    assert not row.int8 and "has codes that TensorRT does not take" in row.reason


def test_multiply_accumulates_and_the_table():
    nodes = [
        op("Conv", ["d", "wd"], "c", pads=[1] * 4),
        op("GlobalAveragePool", ["c"], "p"),
        op("Flatten", ["p"], "f"),
        op("Gemm", ["f", "g"], "y", transB=1),
    ]
    # 8*8*16 results of 16*3*3 products each; 10 results of 16.
    model = small(nodes, {"g": np.ones((10, 16), np.float32)}, ("batch", 16, 8, 8))
    prediction = predict_int8(model)
    macs = [row.macs for row in prediction.rows]
    assert macs == [147456, 0, 160]
    assert prediction.share == 147456 / 147616
    assert [row.op for row in prediction.float_rows] == ["GlobalAveragePool", "Gemm"]
    lines = str(prediction).splitlines()
    assert lines[0].split() == ["node", "op", "runs", "in", "why"]
    assert lines[-1] == "tensorrt: 1 of 3 operators in int8, 99.9% of the multiply-accumulates"
    assert predict_int8(small(nodes, {"g": np.ones((10, 16), np.float32)}, None)).share is None
    assert Prediction("tensorrt", []).share is None
    transposed = [op("ConvTranspose", ["d", "wd"])]
    # Each of 8*8*16 inputs goes to 16*3*3 results.
    assert predict_int8(small(transposed)).rows[0].macs == 147456


def test_shapes_are_not_judged():
    nodes = [op("Shape", ["x"], "n"), op("Concat", ["n", "n"], "m", axis=0)]
    nodes.append(helper.make_node("Cast", ["m"], ["y"], to=1))
    assert predict_int8(small(nodes)).rows == []


def test_bad_input(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.onnx is not an ONNX file"):
        predict_int8(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="did you mean 'openvino'"):
        predict_int8(tmp_path / "bad.onnx", "openvin")
    with pytest.raises(FileNotFoundError):
        predict_int8(tmp_path / "none.onnx")
    with pytest.raises(AttributeError):
        Row("n", "Conv", True, "", 0).int8 = False


def dynamic_model():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 16)

        def forward(self, x):
            return self.fc(self.lstm(x)[0])

    return Recurrent().eval()


def test_operators_on_codes_are_what_they_are(tmp_path):
    model, x = dynamic_model(), torch.randn(2, 5, 16)
    quantize(model, {"": INT8_DYNAMIC}, example_inputs=x, placement="onnxruntime")
    calibrate(model, [x], progress=False)
    path = tmp_path / "dynamic.onnx"
    export_onnx(model, x, path, target="onnxruntime")
    rows = predict_int8(path, "onnxruntime").rows
    assert [(row.op, row.int8) for row in rows] == [
        ("DynamicQuantizeLSTM", True),
        ("MatMulInteger", True),
    ]
    assert not any(row.int8 for row in predict_int8(path, "tensorrt").rows)


def test_fp8_codes_run_nowhere_on_integers_and_still_load(tmp_path):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    x = torch.randn(4, 32)
    quantize(model, {"*": FP8}, example_inputs=x)
    calibrate(model, [x], progress=False)
    path = tmp_path / "fp8.onnx"
    export_onnx(model, x, path)
    rows = predict_int8(path, "onnxruntime").rows
    assert rows and not any(row.int8 for row in rows)
    assert {row.runs_in for row in rows} == {"float"}
    taken = predict_int8(path, "tensorrt")
    assert [row.runs_in for row in taken.rows] == ["fp8", "fp8"]
    assert "2 of 2 operators in fp8" in str(taken) and "int8" not in str(taken)
    # With all optimizations the session is refused, or the Relu is gone.
    found = open_session(path, "onnxruntime").run([x])[0]
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-5, atol=1e-5)
