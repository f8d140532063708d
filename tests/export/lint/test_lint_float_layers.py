import pytest
from lint_graphs import E4M3, Build, found

from pytorch_quant.export.lint.float_layers import (
    fp8_conv_reason,
    int8_conv_reason,
    small_product_reason,
    vector_reason,
)

SPEED = "performance"


def linear(x_shape, n, op="Gemm"):
    g = Build()
    a = g.qdq(g.input("x", x_shape), "a")
    if op == "Gemm":
        return g.model(g.node("Gemm", [a, g.weight("w", (n, x_shape[-1]))], "fc", transB=1))
    return g.model(g.node("MatMul", [a, g.weight("w", (x_shape[-1], n), 1)], "fc"))


@pytest.mark.parametrize(
    ("shape", "n", "op", "expected"),
    [
        ((8, 32), 32, "Gemm", None),
        ((1, 32), 32, "Gemm", None),
        ((1, 32), 32, "MatMul", None),
        ((None, 32), 32, "MatMul", None),
        ((1, 4, 32), 32, "MatMul", None),
        ((4, None, 32), 32, "MatMul", None),
        ((8, 32), 1, "Gemm", "H1"),
        ((4, 1, 32), 32, "MatMul", None),
        ((4, 8, 32), 1, "MatMul", "H1"),
        ((8, 32), 10, "Gemm", "H2"),
        ((8, 8), 32, "Gemm", "H2"),
        ((8, 16), 16, "Gemm", None),
        ((2, 4, 32), 15, "MatMul", "H2"),
    ],
)
def test_h1_h2_products(shape, n, op, expected):
    assert found(linear(shape, n, op)) == ([(expected, SPEED, "fc")] if expected else [])


@pytest.mark.parametrize(
    ("m", "n", "expected"), [(1, 32, "H1"), (32, 1, "H1"), (None, 32, None), (32, 8, "H2")]
)
def test_h1_h2_products_of_two_activations(m, n, expected):
    g = Build()
    a = g.qdq(g.input("a", (4, m, 32)), "qa")
    y = g.node("MatMul", [a, g.qdq(g.input("b", (4, 32, n)), "qb")], "fc")
    assert found(g.model(y)) == ([(expected, SPEED, "fc")] if expected else [])


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("bmk,bkn->bmn", ((4, 32, 32), (4, 32, 32)), None),
        ("bmk,bkn->bmn", ((4, 1, 32), (4, 32, 32)), "H1"),
        ("...mk,...nk->...mn", ((2, 4, 32, 32), (2, 4, 1, 32)), "H1"),
        ("...mk,...kn", ((4, 32, 8), (4, 8, 32)), "H2"),
        ("...mk,nk->...mn", ((4, 1, 32), (8, 32)), "H2"),
        ("...mk,nk->...mn", ((4, 1, 32), (32, 32)), None),
        ("mk,kn->mn", ((1, 8), (8, 1)), None),
        ("bmk,bmk->bm", ((4, 8, 8), (4, 8, 8)), None),
    ],
)
def test_h1_h2_einsum(equation, shapes, expected):
    g = Build()
    a = g.qdq(g.input("a", shapes[0]), "qa")
    if equation.startswith("...mk,nk"):
        b = g.weight("w", shapes[1])
    else:
        b = g.qdq(g.input("b", shapes[1]), "qb")
    y = g.node("Einsum", [a, b], "fc", equation=equation)
    assert found(g.model(y)) == ([(expected, SPEED, "fc")] if expected else [])


def test_float_products_are_not_judged():
    g = Build()
    y = g.node("Gemm", [g.input("x", (8, 4)), g.floats("w", (4, 1))], "fc")
    assert found(g.model(y)) == []


def conv(cin, cout, size=3, groups=1, first=False, kind=None):
    g = Build()
    x = g.input("x", (1, cin, 8, 8))
    x = x if first else g.node("Tanh", [x], "stem")
    kinds = {"kind": kind} if kind else {}
    a = g.qdq(x, "a", **kinds)
    axis = None if kind else 0
    return g.model(g.conv(a, "conv", cin, cout, size, axis=axis, group=groups, **kinds))


# Cin per group, Cout, kernel, groups, first layer, judged to stay float; from H3's sentence.
INT8_CONVS = [
    (16, 16, (3, 3), 1, False, False),
    (15, 15, (3, 3), 1, False, True),
    (3, 64, (7, 7), 1, True, False),
    (3, 64, (7, 7), 1, False, False),
    (3, 8, (3, 3), 1, True, False),
    (3, 8, (3, 3), 1, False, True),
    (3, 7, (3, 3), 1, True, True),
    (8, 30, (3, 3), 1, False, False),
    (12, 30, (3, 3), 1, False, True),
    (8, 32, (1, 3), 1, False, True),
    (64, 10, (1, 1), 1, False, False),
    (1, 32, (3, 3), 32, False, False),
    (1, 32, (1, 1), 32, False, True),
    (1, 32, (3, 1), 32, False, True),
    (1, 30, (3, 3), 30, False, True),
]


@pytest.mark.parametrize(("cin", "cout", "size", "groups", "first", "stays"), INT8_CONVS)
def test_h3_int8_convolutions(cin, cout, size, groups, first, stays):
    assert (int8_conv_reason(cin, cout, groups, size, first) is not None) == stays
    model = conv(cin * groups, cout, size, groups, first)
    assert found(model) == ([("H3", SPEED, "conv")] if stays else [])


FP8_CONVS = [
    (32, 32, (3, 3), False),
    (16, 32, (3, 3), True),
    (32, 16, (3, 3), True),
    (17, 17, (1, 32), False),
    (32, 32, (7, 7), True),
    (32, 32, (5, 5), False),
]


@pytest.mark.parametrize(("cin", "cout", "size", "stays"), FP8_CONVS)
def test_h4_fp8_convolutions(cin, cout, size, stays):
    assert (fp8_conv_reason(cin, cout, size) is not None) == stays
    assert found(conv(cin, cout, size, kind=E4M3)) == ([("H4", SPEED, "conv")] if stays else [])


@pytest.mark.parametrize("op", ["Tanh", "Pad", "LeakyRelu"])
def test_h6_copies_and_activations(op):
    g = Build()
    inputs = [g.qdq(g.input(), "a")]
    if op == "Pad":
        inputs.append(g.constant("pads", [0, 0, 1, 1, 0, 0, 1, 1]))
    y = g.node(op, inputs, "op")
    assert found(g.model(g.node("Exp", [y], "exp"))) == [("H6", SPEED, "a/Q")]


def test_h6_a_copy_in_front_of_a_layer():
    g = Build()
    y = g.node("Transpose", [g.qdq(g.input(), "a")], "turn", perm=[0, 1, 3, 2])
    assert found(g.model(g.conv(y, "conv"))) == []


def test_h6_a_pair_that_a_layer_reads_as_well():
    g = Build()
    a = g.qdq(g.input(), "a")
    assert found(g.model(g.node("Tanh", [a], "tanh"), g.conv(a, "conv"))) == []
    y = g.node("Relu", [g.qdq(g.input("y"), "b")], "relu")
    assert found(g.model(g.node("Tanh", [y], "tanh2"), g.conv(y, "conv2"))) == []


def test_unknown_sizes_are_no_reason():
    assert vector_reason(None, None) is None
    assert small_product_reason(None, None) is None
