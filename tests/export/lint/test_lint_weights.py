import numpy as np
import pytest
from lint_graphs import INT8, Build, found
from onnx import TensorProto

DTYPE = {"to": TensorProto.FLOAT}


def start(shape=(4, 32)):
    g = Build()
    return g, g.qdq(g.input("x", shape), "a")


def float_weight(g, shape=(32, 32)):
    w = g.rng.normal(size=shape).astype(np.float32)
    scale = np.abs(w).max(1) / 127
    return w, scale


def test_w1_both_forms_are_fine():
    g, a = start()
    w, scale = float_weight(g)
    w = g.qdq(g.constant("w.float", w), "w", scale, axis=0)
    y = g.node("Gemm", [a, w], "fc", transB=1)
    assert (
        found(g.model(g.node("Gemm", [g.qdq(y, "b"), g.weight("v", (32, 32))], "fc2", transB=1)))
        == []
    )


def test_w1_codes_without_a_dq():
    g = Build()
    x = g.input("x", (4, 32))
    codes = g.constant("codes", g.rng.integers(-7, 8, (32, 32)), INT8)
    w = g.node("Mul", [g.node("Cast", [codes], "cast", **DTYPE), g.floats("s", (32,))], "scaled")
    assert found(g.model(g.node("MatMul", [x, w], "fc"))) == [("W1", "error", "fc")]


@pytest.mark.parametrize(
    ("op", "attributes", "severity"),
    [("Transpose", {"perm": [1, 0]}, "warning"), ("Cast", DTYPE, "error")],
)
def test_w2_between_dq_and_operator(op, attributes, severity):
    g, a = start((2, 4, 32))
    w = g.weight("w", (32, 32), 0 if op == "Transpose" else 1)
    w = g.node(op, [w], "between", **attributes)
    assert found(g.model(g.node("MatMul", [a, w], "fc"))) == [("W2", severity, "fc")]


def layer(op, axis, **attributes):
    shape = {"Conv": (32, 32, 3, 3), "ConvTranspose": (32, 32, 2, 2)}.get(op, (32, 32))
    if attributes.get("group", 1) > 1:
        shape = (32, 16, *shape[2:])
    g, a = start((1, 32, 8, 8) if len(shape) == 4 else (4, 32))
    return g.model(g.node(op, [a, g.weight("w", shape, axis)], "layer", **attributes))


AXES = [
    ("Conv", {}, 0, 1),
    ("ConvTranspose", {}, 1, 0),
    ("Gemm", {"transB": 1}, 0, 1),
    ("Gemm", {}, 1, 0),
    ("MatMul", {}, 1, 0),
]


@pytest.mark.parametrize(("op", "attributes", "right", "wrong"), AXES, ids=str)
def test_w3_axes(op, attributes, right, wrong):
    assert found(layer(op, right, **attributes)) == []
    assert found(layer(op, right - 4 if op[0] == "C" else right - 2, **attributes)) == []
    assert found(layer(op, None, **attributes)) == []
    assert found(layer(op, wrong, **attributes)) == [("W3", "error", "layer")]


def test_w3_grouped_transposed_convolutions_are_per_tensor():
    assert found(layer("ConvTranspose", 1, group=2)) == [("W3", "error", "layer")]
    assert found(layer("ConvTranspose", None, group=2)) == []


def test_w3_behind_a_transpose():
    g, a = start((2, 4, 32))
    w = g.node("Transpose", [g.weight("w", (32, 32), 1)], "turn", perm=[1, 0])
    rules = found(g.model(g.node("MatMul", [a, w], "fc")))
    assert rules == [("W2", "warning", "fc"), ("W3", "error", "fc")]


def test_w4_activations():
    g = Build()
    a = g.qdq(g.input("x", (4, 32)), "a", np.full(32, 0.1), axis=1)
    y = g.node("Gemm", [a, g.weight("w", (32, 32))], "fc", transB=1)
    assert found(g.model(y)) == [("W4", "error", "a/Q")]


def test_w5_biases():
    g, a = start()
    b = g.qdq(g.floats("b", (32,)), "b")
    y = g.node("Gemm", [a, g.weight("w", (32, 32)), b], "fc", transB=1)
    assert found(g.model(y)) == [("W5", "error", "fc")]
    g, a = start()
    b = g.weight("b", (32,), None, TensorProto.INT32)
    y = g.node("MatMul", [a, g.weight("w", (32, 32), 1)], "fc")
    model = g.model(g.node("Add", [y, b], "bias"))
    assert found(model) == [("W5", "error", "b/DQ")]
    assert found(model, "onnxruntime") == []


def test_w6_a_zero_channel():
    g, a = start()
    scale = np.full(32, 0.1)
    scale[3] = 0
    y = g.node("Gemm", [a, g.weight("w", (32, 32), 0, scale=scale)], "fc", transB=1)
    assert found(g.model(y)) == [("W6", "error", "w/DQ")]
    assert found(g.model("fc_out"), "onnxruntime") == [("R3", "error", "w/DQ")]


@pytest.mark.parametrize("axis", [0, None])
def test_w7_folded(axis):
    g, a = start()
    w, scale = float_weight(g)
    scale = scale.max() if axis is None else scale[:, None]
    g.constant("w", (np.round(w / scale) * scale).astype(np.float32))
    model = g.model(g.node("Gemm", [a, "w"], "fc", transB=1))
    assert found(model) == [("W7", "warning", "fc")]
    assert found(model, "onnxruntime") == [("L1", "performance", "fc")]


def test_w7_a_float_weight_is_l1():
    g, a = start()
    y = g.node("Gemm", [a, g.floats("w", (32, 32))], "fc", transB=1)
    assert found(g.model(y)) == [("L1", "performance", "fc")]
