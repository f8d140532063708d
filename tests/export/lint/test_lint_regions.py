import pytest
from lint_graphs import INT8, Build, found
from onnx import TensorProto, helper

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.mark.parametrize("quantized", [True, False])
def test_l3_batchnorm_behind_a_convolution(quantized):
    g = Build()
    x = g.input()
    if quantized:
        y = g.conv(g.qdq(x, "a"), "conv")
    else:
        y = g.node("Conv", [x, g.floats("w", (16, 16, 3, 3))], "conv")
    model = g.model(g.batchnorm(y, "bn"))
    assert found(model) == ([("L3", "warning", "bn")] if quantized else [])


@pytest.mark.parametrize("mixed", [True, False])
def test_l13_float32_beside_half(mixed):
    g = Build(dtype=FLOAT16 if mixed else FLOAT)
    y = g.node("MatMul", [g.input("x", (4, 32)), g.floats("w", (32, 32))], "half")
    g.dtype = FLOAT
    z = g.node("MatMul", [g.input("y", (4, 32), FLOAT), g.floats("v", (32, 32))], "single")
    y = g.node("Cast", [y], "cast", to=FLOAT)
    assert found(g.model(y, z)) == ([("L13", "warning", "single")] if mixed else [])


@pytest.mark.parametrize(("scale", "clean"), [(2.0**-23, False), (2.0**-20, True)])
def test_l14_dead_quantizers(scale, clean):
    g = Build()
    y = g.conv(g.qdq(g.input(), "a", scale), "conv")
    assert found(g.model(y)) == ([] if clean else [("L14", "warning", "a/Q")])


def test_l15_bodies():
    inner = Build()
    inner.scale("a", 0.1, INT8)
    body = inner.model(inner.dq(inner.node("QuantizeLinear", ["x", "a.scale", "a.zero"], "q"), "a"))
    g = Build()
    x, condition = g.input(), g.input("condition", (), TensorProto.BOOL)
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "other",
        [],
        [helper.make_tensor_value_info("same", FLOAT, None)],
    )
    y = g.node("If", [condition], "branch", then_branch=body.graph, else_branch=other)
    assert found(g.model(y)) == [("L15", "warning", "branch")] * 2
    # A tensor that a body reads has a reader, so that the pair in front is no pair for it alone.
    assert g.conv(g.qdq(x, "b"), "conv")


def test_l15_integers():
    g = Build()
    y = g.node("Exp", [g.qdq(g.input("x", (4, 32), TensorProto.INT32), "a")], "exp")
    rules = found(g.model(g.node("Gemm", [g.qdq(y, "b"), g.weight("w", (32, 32))], "fc", transB=1)))
    assert ("L15", "warning", "a/Q") in rules
