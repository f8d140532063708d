import os
import shutil

import numpy as np
import onnx
import onnx_runs
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from pytorch_quant.export.fix import fix_onnx
from pytorch_quant.export.lint import lint_onnx

SIGNED, UNSIGNED = QuantType.QInt8, QuantType.QUInt8
SYMMETRIC = {"ActivationSymmetric": True}
X = np.random.default_rng(1).normal(size=(2, 16, 8, 8)).astype(np.float32)


def node(op, inputs, output, **attributes):
    domain = attributes.pop("domain", "")
    return helper.make_node(
        op, inputs, [output], name=f"{output}_node", domain=domain, **attributes
    )


def model_of(nodes, constants, outputs=("y",), shape=X.shape, opset=20):
    held = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    infos = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    graph = helper.make_graph(nodes, "g", inputs, infos, held)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def network():
    """Conv, Relu, MaxPool, Conv, Relu, Flatten, Gemm in float."""
    rng = np.random.default_rng(0)

    def floats(*shape):
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    constants = {"w1": floats(16, 16, 3, 3), "w2": floats(16, 16, 3, 3), "w3": floats(16, 256)}
    # Larger above 0 than below, so that Conv and Relu have one range.
    constants |= {f"b{i}": np.full(16, 0.8, np.float32) for i in (1, 2, 3)}
    nodes = [
        node("Conv", ["x", "w1", "b1"], "c1", pads=[1] * 4),
        node("Relu", ["c1"], "r1"),
        node("MaxPool", ["r1"], "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "w2", "b2"], "c2", pads=[1] * 4),
        node("Relu", ["c2"], "r2"),
        node("Flatten", ["r2"], "f"),
        node("Gemm", ["f", "w3", "b3"], "y", transB=1),
    ]
    return model_of(nodes, constants)


class Batches(CalibrationDataReader):
    def __init__(self):
        self.left = iter(np.random.default_rng(2).normal(size=(3, *X.shape)).astype(np.float32))

    def get_next(self):
        x = next(self.left, None)
        return None if x is None else {"x": x}


def quantized(path, model=None, extra=SYMMETRIC, **options):
    source = path.with_name("float.onnx")
    onnx.save(model or network(), source)
    options = {"activation_type": UNSIGNED, "weight_type": SIGNED, "per_channel": True} | options
    quantize_static(
        source, path, Batches(), quant_format=QuantFormat.QDQ, extra_options=extra, **options
    )
    return path


def fixed(path, target="tensorrt", x=X):
    """The report of a repair that leaves the outputs as they were."""
    out = path.with_name("fixed.onnx")
    report = fix_onnx(path, out, target=target)
    assert report.path == out and report.findings == lint_onnx(out, target)
    onnx.shape_inference.infer_shapes(onnx.load(out), check_type=True, strict_mode=True)
    expected, got = onnx_runs.run(path, x), onnx_runs.run(out, x)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)
    return report


def saved(tmp_path, model):
    onnx.save(model, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def kinds(path):
    return [n.op_type for n in onnx.load(path).graph.node]


INPUTS_ALONE = SYMMETRIC | {
    "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "Relu", "MaxPool", "Flatten"]
}


def test_quantize_static_with_int32_bias_and_uint8_activations_becomes_clean(tmp_path):
    path = quantized(tmp_path / "in.onnx", extra=INPUTS_ALONE)
    before = {(f.rule, f.severity) for f in lint_onnx(path)}
    assert before >= {("R4", "error"), ("R6", "error"), ("W5", "error")}
    report = fixed(path)
    assert report.findings == []
    assert report.repairs["bias stored as float"] == 3
    assert report.repairs["activation of uint8 made int8"] == 3
    assert "no findings left" in str(report)


def test_quantize_static_as_it_is_keeps_the_pair_on_the_output_alone(tmp_path):
    report = fixed(quantized(tmp_path / "in.onnx"))
    # Its Q rounds the logits, so that it cannot go.
    assert [(f.rule, f.severity) for f in report.findings] == [("L9", "performance")]
    assert "findings left: 1 performance" in str(report)
    # Of the pairs around Relu, MaxPool and Flatten one is left on each way.
    assert kinds(report.path).count("QuantizeLinear") == 4


OPTIONS = {
    "signed": {"activation_type": SIGNED},
    "per tensor": {"per_channel": False},
    "unsigned weights": {"weight_type": UNSIGNED, "extra": SYMMETRIC | {"WeightSymmetric": True}},
    "float weights": {"extra": SYMMETRIC | {"AddQDQPairToWeight": True}},
    "pair for each reader": {"extra": SYMMETRIC | {"DedicatedQDQPair": True}},
    "float bias": {"extra": SYMMETRIC | {"QuantizeBias": False}},
    "own domain": {"extra": SYMMETRIC | {"UseQDQContribOps": True}},
    "reduced range": {"reduce_range": True},
    "all kept": {"extra": SYMMETRIC | {"QDQKeepRemovableActivations": True}},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
def test_options_of_quantize_static(tmp_path, name, target):
    report = fixed(quantized(tmp_path / "in.onnx", **OPTIONS[name]), target)
    assert [f for f in report.findings if f.severity == "error"] == []
    types = {c.name: c.data_type for c in onnx.load(report.path).graph.initializer}
    for n in onnx.load(report.path).graph.node:
        if n.op_type == "QuantizeLinear":
            signed = types[n.input[2]] == TensorProto.INT8
            assert signed == (target == "tensorrt")


@pytest.mark.parametrize("weight_type", [SIGNED, UNSIGNED])
def test_asymmetric_activations_are_left(tmp_path, weight_type):
    report = fixed(quantized(tmp_path / "in.onnx", extra={}, weight_type=weight_type))
    assert {f.rule for f in report.findings if f.severity == "error"} <= {"R4", "R6"}
    assert "R4" in {f.rule for f in report.findings}


def test_16_bits_are_left(tmp_path):
    report = fixed(quantized(tmp_path / "in.onnx", activation_type=QuantType.QInt16))
    assert {f.rule for f in report.findings if f.severity == "error"} == {"R6"}


PAIR = [
    node("QuantizeLinear", ["x", "s", "z"], "q"),
    node("DequantizeLinear", ["q", "s", "z"], "d"),
]
HALF = {"s": np.float32(0.5), "z": np.int8(0)}


def test_absent_zero_points_are_written_as_onnx_means_them(tmp_path):
    nodes = [node("QuantizeLinear", ["x", "s"], "q"), node("DequantizeLinear", ["q", "s"], "y")]
    report = fixed(saved(tmp_path, model_of(nodes, {"s": np.float32(0.5)})))
    held = {c.name: c for c in onnx.load(report.path).graph.initializer}
    assert held["s.zero_point"].data_type == TensorProto.UINT8
    assert report.repairs == {"zero point written": 2}
    # uint8 codes above 127 have no int8 form.
    assert next(f.message for f in report.findings if f.rule == "R6").startswith(
        "its codes are UINT8"
    )


def test_absent_zero_points_of_codes_have_their_type(tmp_path):
    codes = np.arange(-8, 8, dtype=np.int8).reshape(16, 1, 1, 1)
    scale = np.linspace(0.1, 1, 16, dtype=np.float32)
    nodes = [
        *PAIR,
        node("DequantizeLinear", ["w", "ws"], "wd", axis=0),
        node("Conv", ["d", "wd"], "y", group=16),
    ]
    report = fixed(saved(tmp_path, model_of(nodes, HALF | {"w": codes, "ws": scale})))
    assert report.repairs == {"zero point written": 1}
    held = {c.name: c for c in onnx.load(report.path).graph.initializer}
    assert held["ws.zero_point"].data_type == TensorProto.INT8
    assert list(held["ws.zero_point"].dims) == [16]


def test_missing_axes_are_those_of_onnx(tmp_path):
    rng = np.random.default_rng(0)
    constants = HALF | {
        "w": rng.normal(size=(16, 24)).astype(np.float32),
        "ws": np.linspace(0.01, 0.03, 24, dtype=np.float32),
        "wz": np.zeros(24, np.int8),
    }
    nodes = [
        *PAIR,
        node("QuantizeLinear", ["w", "ws", "wz"], "wq"),
        node("DequantizeLinear", ["wq", "ws", "wz"], "wd"),
        node("MatMul", ["d", "wd"], "y"),
    ]
    path = saved(tmp_path, model_of(nodes, constants, shape=(32, 16)))
    assert "R8" in {f.rule for f in lint_onnx(path)}
    report = fixed(path, x=X.reshape(-1, 16)[:32])
    assert report.findings == []
    assert report.repairs == {"axis written": 2, "weight stored as codes": 1}


@pytest.mark.parametrize("zero_point", [0, 128, 7])
def test_weights_of_uint8(tmp_path, zero_point):
    rng = np.random.default_rng(0)
    high = 128 if zero_point == 0 else 256
    codes = rng.integers(0, high, (16, 16)).astype(np.uint8)
    constants = HALF | {"w": codes, "ws": np.float32(0.01), "wz": np.uint8(zero_point)}
    nodes = [
        *PAIR,
        node("DequantizeLinear", ["w", "ws", "wz"], "wd"),
        node("MatMul", ["d", "wd"], "y"),
    ]
    path = saved(tmp_path, model_of(nodes, constants, shape=(32, 16)))
    report = fixed(path, x=X.reshape(-1, 16)[:32])
    held = {c.name: c for c in onnx.load(report.path).graph.initializer}
    assert (held["w"].data_type == TensorProto.INT8) == (zero_point != 7)
    assert {f.rule for f in report.findings} == ({"R4", "R6"} if zero_point == 7 else set())


def test_scales_of_zero(tmp_path):
    scale = np.array([0.1, 0, 0.2, *[0.3] * 13], np.float32)
    constants = HALF | {
        "w": np.full((16, 1, 1, 1), 5, np.int8),
        "ws": scale,
        "wz": np.zeros(16, np.int8),
    }
    nodes = [
        *PAIR,
        node("DequantizeLinear", ["w", "ws", "wz"], "wd", axis=0),
        node("Conv", ["d", "wd"], "y", group=16),
    ]
    path = saved(tmp_path, model_of(nodes, constants))
    assert "W6" in {f.rule for f in lint_onnx(path)}
    report = fixed(path)
    assert report.repairs == {"scale of 0 in a weight raised": 1}
    assert "W6" not in {f.rule for f in report.findings}


def test_biases_behind_any_dq_become_float(tmp_path):
    constants = HALF | {
        "w": np.full((16, 16, 1, 1), 5, np.int8),
        "ws": np.float32(0.01),
        "b": np.linspace(-1, 1, 16, dtype=np.float32),
        "bs": np.float32(0.01),
    }
    nodes = [
        *PAIR,
        node("DequantizeLinear", ["w", "ws", "z"], "wd"),
        node("QuantizeLinear", ["b", "bs", "z"], "bq"),
        node("DequantizeLinear", ["bq", "bs", "z"], "bd"),
        node("Conv", ["d", "wd", "bd"], "y"),
    ]
    path = saved(tmp_path, model_of(nodes, constants))
    assert fixed(path).repairs == {"bias stored as float": 1}
    assert kinds(tmp_path / "fixed.onnx").count("DequantizeLinear") == 2


def test_pairs_that_do_nothing(tmp_path):
    again = [
        node("QuantizeLinear", ["d", "s", "z"], "q2"),
        node("DequantizeLinear", ["q2", "s", "z"], "d2"),
        node("QuantizeLinear", ["x", "s2", "z"], "q3"),
        node("DequantizeLinear", ["q3", "s2", "z"], "d3"),
        node("Add", ["d2", "d3"], "y"),
    ]
    constants = HALF | {"s2": np.float32(0.5)}
    report = fixed(saved(tmp_path, model_of([*PAIR, *again], constants)))
    assert report.repairs == {
        "Q behind a DQ of equal scale dropped": 1,
        "node of equal scale on one tensor merged": 2,
    }
    assert kinds(report.path) == ["QuantizeLinear", "DequantizeLinear", "Add"]


@pytest.mark.parametrize(
    ("second", "shared", "dropped"), [(0.5, False, True), (0.25, False, False), (0.5, True, False)]
)
def test_pairs_in_front_of_what_keeps_the_grid(tmp_path, second, shared, dropped):
    nodes = [
        *PAIR,
        node("Relu", ["d"], "r"),
        node("MaxPool", ["r"], "p", kernel_shape=[3, 3], pads=[1] * 4),
        node("QuantizeLinear", ["p", "s2", "z"], "q2"),
        node("DequantizeLinear", ["q2", "s2", "z"], "d2"),
        node("Add", ["d2", "d" if shared else "d2"], "y"),
    ]
    model = model_of(nodes, HALF | {"s2": np.float32(second)})
    report = fixed(saved(tmp_path, model), x=X * 40)
    name = "pair in front of an operator that keeps the grid dropped"
    assert (name in report.repairs) == dropped
    assert name not in fixed(saved(tmp_path, model), "onnxruntime").repairs


def test_transposes_of_weights_are_folded(tmp_path):
    pytest.importorskip("pytorch_quant.export.transposes")
    codes = np.arange(-64, 64, dtype=np.int8).reshape(8, 16)
    constants = HALF | {"w": codes, "ws": np.float32(0.01)}
    nodes = [
        *PAIR,
        node("DequantizeLinear", ["w", "ws", "z"], "wd"),
        node("Transpose", ["wd"], "wt", perm=[1, 0]),
        node("MatMul", ["d", "wt"], "y"),
    ]
    path = saved(tmp_path, model_of(nodes, constants, shape=(32, 16)))
    report = fixed(path, x=X.reshape(-1, 16)[:32])
    assert report.repairs == {"Transpose of a weight folded": 1}
    assert "Transpose" not in kinds(report.path)


def test_products_that_onnx_runtime_would_run_in_float(tmp_path):
    codes = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    constants = HALF | {"w": codes, "ws": np.float32(0.01), "b": np.ones(16, np.float32)}
    nodes = [
        *PAIR,
        node("DequantizeLinear", ["w", "ws", "z"], "wd"),
        node("MatMul", ["d", "wd"], "m"),
        node("Add", ["m", "b"], "y"),
    ]
    path = saved(tmp_path, model_of(nodes, constants, shape=(2, 64, 16)))
    report = fixed(path, "onnxruntime", X.reshape(2, 64, 16))
    assert report.repairs["bias kept from making a Gemm that runs in float"] == 1
    assert report.findings == []
    bias = next(c for c in onnx.load(report.path).graph.initializer if c.name == "b")
    assert list(bias.dims) == [1, 1, 16]


def test_transposed_convolutions_stay_signed_for_openvino(tmp_path):
    constants = HALF | {"w": np.full((16, 4, 2, 2), 3, np.int8), "ws": np.float32(0.01)}
    nodes = [
        *PAIR,
        node("DequantizeLinear", ["w", "ws", "z"], "wd"),
        node("ConvTranspose", ["d", "wd"], "y"),
    ]
    path = saved(tmp_path, model_of(nodes, constants))
    assert fixed(path, "openvino").repairs == {}
    assert fixed(path, "onnxruntime").repairs == {"activation of int8 made uint8": 1}


def test_a_clean_file_stays_as_it_is(tmp_path):
    path = saved(tmp_path, model_of([*PAIR, node("Add", ["d", "d"], "y")], HALF))
    report = fixed(path)
    assert report.repairs == {} and "nothing to repair" in str(report)
    assert onnx.load(path) == onnx.load(report.path)


def external(path):
    return {
        e.value
        for c in onnx.load(path, load_external_data=False).graph.initializer
        for e in c.external_data
        if e.key == "location"
    }


def test_external_data(tmp_path):
    model = onnx.load(quantized(tmp_path / "whole.onnx", extra=INPUTS_ALONE))
    path, data = tmp_path / "in.onnx", tmp_path / "in.onnx.data"
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=16)
    before = (path.read_bytes(), data.read_bytes())
    assert fixed(path).findings == []
    assert external(tmp_path / "fixed.onnx") == {"fixed.onnx.data"}
    assert before == (path.read_bytes(), data.read_bytes())
    (expected,) = onnx_runs.run(path, X)
    for _ in range(2):
        fix_onnx(path, path)
        np.testing.assert_array_equal(onnx_runs.run(path, X)[0], expected)
    assert external(path) == {"in.onnx.data"}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    fix_onnx(path, folder / "in.onnx")
    data.unlink()
    np.testing.assert_array_equal(onnx_runs.run(folder / "in.onnx", X)[0], expected)
    with pytest.raises(FileNotFoundError, match=r"in\.onnx\.data does not exist, and .* keeps"):
        fix_onnx(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    data.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"in\.onnx\.data does not hold all of .* truncated"):
        fix_onnx(path, path)


def test_in_place_and_over_another_file(tmp_path):
    path = quantized(tmp_path / "in.onnx", extra=INPUTS_ALONE)
    out = tmp_path / "out.onnx"
    out.write_text("old")
    fix_onnx(str(path), str(out))
    assert fix_onnx(path, path).findings == []
    assert path.read_bytes() == out.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float.onnx", "in.onnx", "out.onnx"]


@pytest.mark.parametrize("content", [b"", b"no model at all", None])
def test_what_is_no_model(tmp_path, content):
    whole = quantized(tmp_path / "in.onnx", extra=INPUTS_ALONE).read_bytes()
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(whole[: len(whole) // 2] if content is None else content)
    before = bad.read_bytes()
    with pytest.raises(ValueError, match=r"bad\.onnx is not an ONNX file"):
        fix_onnx(bad, bad)
    with pytest.raises(ValueError, match=r"bad\.onnx is not an ONNX file"):
        fix_onnx(bad, tmp_path / "out.onnx")
    assert bad.read_bytes() == before and not (tmp_path / "out.onnx").exists()


def test_paths_and_targets(tmp_path):
    path = quantized(tmp_path / "in.onnx")
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError):
        fix_onnx(tmp_path / "none.onnx", tmp_path / "out.onnx")
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        fix_onnx(path, tmp_path / "none" / "out.onnx")
    with pytest.raises(IsADirectoryError):
        fix_onnx(path, tmp_path)
    with pytest.raises(ValueError, match="did you mean 'tensorrt'"):
        fix_onnx(path, path, target="tensort")
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_file(tmp_path, monkeypatch):
    path = quantized(tmp_path / "in.onnx", extra=INPUTS_ALONE)
    shutil.copy(path, tmp_path / "copy.onnx")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        fix_onnx(path, path)
    assert path.read_bytes() == (tmp_path / "copy.onnx").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3
