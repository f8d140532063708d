import numpy as np
import onnx
import pytest
from lint_graphs import E4M3, Build, found
from onnx import TensorProto

UINT8, FLOAT16 = TensorProto.UINT8, TensorProto.FLOAT16
ALL = ["tensorrt", "onnxruntime", "openvino"]


def linear(g, a, name="fc", **weight):
    w = g.weight(f"{name}.w", (32, 32), **weight)
    return g.node("Gemm", [a, w], name, transB=1)


def graph(scale=0.1, zero=0, kind=TensorProto.INT8, opset=20, **attributes):
    """x -> Q -> DQ -> Gemm, with the scale and the zero point as given."""
    g = Build(opset)
    x = g.input("x", (4, 32))
    g.constant("a.scale", np.asarray(scale, np.float32))
    g.constant("a.zero", np.full(np.shape(scale), zero), kind)
    q = g.node("QuantizeLinear", [x, "a.scale", "a.zero"], "a/Q", **attributes)
    return g, g.dq(q, "a", **attributes)


@pytest.mark.parametrize("target", ALL)
def test_a_pair_is_clean(target):
    g, a = graph()
    assert found(g.model(linear(g, a)), target) == []


@pytest.mark.parametrize(("domain", "severity"), [("com.microsoft", "error"), ("trt", "warning")])
def test_r1_domain(domain, severity):
    g = Build()
    inputs = [g.input("x", (4, 32)), *g.scale("a", 0.1, TensorProto.INT8)]
    y = g.node("QuantizeLinear", inputs, "a/Q", domain=domain)
    model = g.model(g.node("Mystery", [y], "reader", domain=domain))
    assert ("R1", severity, "a/Q") in found(model)


@pytest.mark.parametrize("target", ALL)
def test_r2_a_scale_that_is_computed(target):
    g = Build()
    x, scale = g.input("x", (4, 32)), g.input("scale", ())
    g.constant("a.zero", 0, TensorProto.INT8)
    q = g.node("QuantizeLinear", [x, scale, "a.zero"], "a/Q")
    a = g.node("DequantizeLinear", [q, scale, "a.zero"], "a/DQ")
    assert found(g.model(linear(g, a)), target) == [
        ("R2", "error", "a/Q"),
        ("R2", "error", "a/DQ"),
    ]


def test_r2_a_scale_from_constants_alone():
    g = Build()
    x = g.input("x", (4, 32))
    parts = [g.constant("amax", np.float32(12.7)), g.constant("bound", np.float32(127))]
    scale = g.node("Div", parts, "divide")
    g.constant("a.zero", 0, TensorProto.INT8)
    q = g.node("QuantizeLinear", [x, scale, "a.zero"], "a/Q")
    a = g.node("DequantizeLinear", [q, scale, "a.zero"], "a/DQ")
    assert found(g.model(linear(g, a))) == []
    g.constants[0] = onnx.numpy_helper.from_array(np.float32(-1), "amax")
    assert found(g.model(linear(g, a, "other"))) == [("R3", "error", "a/Q")]


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("scale", [0, -0.1, np.nan, np.inf])
def test_r3_scales(scale, target):
    g, a = graph(scale)
    assert found(g.model(linear(g, a)), target) == [("R3", "error", "a/Q")]


def test_r4_zero_point():
    g, a = graph(zero=3)
    model = g.model(linear(g, a))
    assert found(model) == [("R4", "error", "a/Q")]
    assert found(model, "onnxruntime") == []


@pytest.mark.parametrize("target", ALL)
def test_r5_zero_point_shape_and_type(target):
    g, a = graph()
    g.constants[1] = onnx.numpy_helper.from_array(np.zeros(2, np.int8), "a.zero")
    model = g.model(linear(g, a))
    assert found(model, target) == [("R5", "error", "a/Q"), ("R5", "error", "a/DQ")]
    g, a = graph()
    g.constant("other", 0, E4M3)
    g.nodes[1].input[2] = "other"
    assert ("R5", "error", "a/DQ") in found(g.model(linear(g, a)), target)


@pytest.mark.parametrize("kind", [UINT8, TensorProto.INT16, TensorProto.FLOAT8E5M2])
def test_r6_types(kind):
    g, a = graph(kind=kind, opset=21)
    model = g.model(linear(g, a))
    assert found(model) == [("R6", "error", "a/Q")]
    assert found(model, "onnxruntime") == []


def test_r6_no_zero_point():
    g = Build(opset=21)
    x = g.input("x", (4, 32))
    g.scale("a", 0.1, TensorProto.INT8)
    for name, attributes in (("a", {}), ("b", {"output_dtype": TensorProto.INT8})):
        q = g.node("QuantizeLinear", [x, "a.scale"], f"{name}/Q", **attributes)
        x = linear(g, g.node("DequantizeLinear", [q, "a.scale"], f"{name}/DQ"), name)
    assert found(g.model(x)) == [("R6", "error", "a/Q")]


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("shape", [(31,), (2, 16), (3, 32)])
def test_r7_scale_shapes(shape, target):
    g = Build(opset=21)
    a = g.qdq(g.input("x", (4, 32)), "a")
    w = g.weight("w", (32, 32), 0, scale=np.full(shape, 0.1))
    model = g.model(g.node("Gemm", [a, w], "fc", transB=1))
    assert found(model, target) == [("R7", "error", "w/DQ")]


def test_r8_axis():
    g = Build()
    a = g.qdq(g.input("x", (4, 32)), "a")
    w = g.weight("w", (32, 32), None, scale=np.full(32, 0.1))
    model = g.model(g.node("Gemm", [a, w], "fc"))
    assert found(model) == [("R8", "error", "w/DQ")]
    assert found(model, "onnxruntime") == [("R8", "warning", "w/DQ")]
    g.nodes[2].attribute.append(onnx.helper.make_attribute("axis", 1))
    assert found(model := g.model(g.node("Gemm", [a, w], "again"))) == []
    g.nodes[2].attribute[0].i = 2
    model = g.model("fc_out")
    assert found(model, "openvino") == [("R8", "error", "w/DQ")]


def test_r9_half_precision():
    nodes = ["a/Q", "a/DQ", "w/DQ"]
    for opset, expected in ((19, []), (18, [("R9", "error", node) for node in nodes])):
        g = Build(opset, dtype=FLOAT16)
        a = g.qdq(g.input("x", (4, 32)), "a")
        y = g.node("Gemm", [a, g.weight("w", (32, 32))], "fc", transB=1)
        assert found(g.model(y)) == expected


def test_r9_a_cast_behind_the_dq():
    g, a = graph()
    cast = g.node("Cast", [a], "cast", to=TensorProto.FLOAT)
    assert found(g.model(linear(g, cast))) == [("R9", "error", "cast")]


@pytest.mark.parametrize("target", ALL)
def test_r10_scales_differ(target):
    g, a = graph()
    g.constant("other", np.float32(0.2))
    g.nodes[1].input[1] = "other"
    assert found(g.model(linear(g, a)), target) == [("R10", "warning", "a/DQ")]


def test_r10_equal_scales_of_two_names():
    g, a = graph()
    g.constant("other", np.float32(0.1))
    g.nodes[1].input[1] = "other"
    assert found(g.model(linear(g, a))) == []


def test_r11_pairs():
    g = Build()
    q = g.q(g.input("x", (4, 32)), "a")
    q = g.node("Identity", [q], "between")
    assert found(g.model(linear(g, g.dq(q, "a")))) == [("R11", "warning", "a/Q")]
    g, a = graph()
    model = g.model(linear(g, a), "a/Q_out")
    assert found(model) == [("R11", "warning", "a/Q")]
    g = Build()
    x = g.input("x", (4, 32), TensorProto.INT8)
    g.scale("a", 0.1, TensorProto.INT8)
    assert found(g.model(linear(g, g.dq(x, "a")))) == [("R11", "warning", "a/DQ")]


def test_r12_integer_operators():
    g = Build()
    q, scale, zero = g.node("DynamicQuantizeLinear", [g.input("x", (4, 32))], "dynamic", outputs=3)
    a = g.node("DequantizeLinear", [q, scale, zero], "a/DQ")
    model = g.model(linear(g, a))
    assert found(model) == [("R12", "error", "dynamic")]
    assert found(model, "onnxruntime") == found(model, "openvino") == []


@pytest.mark.parametrize(
    ("opset", "ir", "clean"), [(26, 10, False), (20, 11, False), (23, 11, True)]
)
def test_r13_versions(opset, ir, clean):
    g, a = graph(opset=opset)
    g.ir_version = ir
    assert found(g.model(linear(g, a))) == ([] if clean else [("R13", "warning", "the model")])
