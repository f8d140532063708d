import numpy as np
import pytest
from lint_graphs import Build, found

SPEED = "performance"


def residual(identity, side, deep=1, project=False, names=("a", "b")):
    """`identity` and `side`: whether the branch has a pair in front of the Add."""
    g = Build()
    x = g.node("Relu", [g.input()], "stem")
    a = g.qdq(x, "a")
    y = a
    for k in range(deep):
        y = g.conv(y if k == 0 else g.qdq(y, f"in{k}"), f"conv{k}")
    if side:
        y = g.qdq(y, "side")
    short = g.conv(a, "project") if project else (a if identity else x)
    if project and identity:
        short = g.qdq(short, "short")
    total = g.node("Add", [y, short], "add")
    total = g.node("Relu", [total], "relu")
    return g.model(g.conv(g.qdq(total, "next_in"), "next"))


class TestResidual:
    def test_the_identity_is_quantized(self):
        assert found(residual(identity=True, side=False)) == []

    def test_both_sides(self):
        assert found(residual(identity=True, side=True)) == [("L4", SPEED, "add")]

    def test_the_wrong_side(self):
        assert found(residual(identity=False, side=True)) == [("L4", SPEED, "add")]

    def test_neither_side(self):
        assert found(residual(identity=False, side=False)) == [("L4", SPEED, "add")]

    def test_of_two_convolutions_the_shorter_branch(self):
        assert found(residual(True, False, deep=2, project=True)) == []
        assert found(residual(False, True, deep=2, project=True)) == [("L4", SPEED, "add")]

    def test_of_two_branches_as_long_either(self):
        assert found(residual(True, False, deep=1, project=True)) == []
        assert found(residual(False, True, deep=1, project=True)) == []

    def test_a_convolution_that_others_read_is_an_identity(self):
        g = Build()
        stem = g.conv(g.qdq(g.input(), "a"), "stem")
        b = g.qdq(stem, "b")
        y = g.node("Add", [b, g.conv(b, "conv")], "add")
        assert found(g.model(y)) == []

    def test_float_behind_the_add(self):
        g = Build()
        x = g.node("Relu", [g.input()], "stem")
        y = g.node("Add", [x, g.conv(g.qdq(x, "a"), "conv")], "add")
        assert found(g.model(g.node("Tanh", [y], "tanh"))) == [("L4", SPEED, "add")]

    def test_an_identity_of_another_shape(self):
        g = Build()
        x = g.node("Relu", [g.input("x", (1, 16, 1, 1))], "stem")
        y = g.node("Add", [x, g.conv(g.qdq(g.input("y"), "a"), "conv")], "add")
        assert found(g.model(g.node("Tanh", [y], "tanh"))) == []

    @pytest.mark.parametrize("sides", [True, False])
    def test_a_float_convolution_is_any_branch(self, sides):
        g = Build()
        x = g.node("Relu", [g.input()], "stem")
        y = g.node("Conv", [x, g.floats("w", (16, 16, 1, 1))], "conv")
        terms = [g.qdq(x, "a"), g.qdq(y, "b")] if sides else [x, y]
        y = g.qdq(g.node("Add", terms, "add"), "c")
        expected = [] if sides else [("L8", SPEED, "add")]
        assert found(g.model(g.conv(y, "next"))) == expected

    def test_a_rescaled_convolution(self):
        g = Build()
        a = g.qdq(g.node("Relu", [g.input()], "stem"), "a")
        gamma = g.floats("gamma", (16, 1, 1))
        y = g.node("Mul", [g.conv(a, "conv"), gamma], "scale")
        y = g.node("Add", [a, y], "add")
        assert found(g.model(g.node("Tanh", [y], "tanh"))) == []

    def test_activations_do_not_make_a_branch_longer(self):
        g = Build()
        a = g.qdq(g.node("Tanh", [g.input()], "stem"), "a")
        one = g.qdq(g.node("Relu", [g.conv(a, "first")], "relu"), "b")
        y = g.node("Add", [one, g.conv(a, "second")], "add")
        assert found(g.model(g.conv(g.qdq(y, "c"), "next"))) == []

    def test_an_add_of_a_constant(self):
        g = Build()
        y = g.conv(g.qdq(g.input(), "a"), "conv")
        y = g.node("Add", [y, g.floats("b", (16, 1, 1))], "bias")
        assert found(g.model(g.conv(g.qdq(y, "b"), "next"))) == []


def concat(first, second, behind):
    g = Build()
    x, y = g.input("x"), g.input("y")
    x = g.qdq(x, "a", first) if first else x
    y = g.qdq(y, "b", second) if second else y
    y = g.node("Concat", [x, y], "cat", axis=1)
    y = g.qdq(y, "c", behind) if behind else y
    return g.model(g.conv(y, "conv", cin=32) if behind else g.node("Tanh", [y], "tanh"))


class TestConcat:
    @pytest.mark.parametrize(
        "scales", [(0.1, 0.1, 0.1), (0.1, 0.1, None), (None, None, 0.1), (0.1, None, 0.1)]
    )
    def test_one_scale(self, scales):
        assert found(concat(*scales)) == []

    @pytest.mark.parametrize(
        "scales", [(0.1, 0.2, None), (0.1, 0.1, 0.2), (0.1, 0.2, 0.1), (0.1, None, None)]
    )
    def test_several(self, scales):
        assert found(concat(*scales)) == [("L6", SPEED, "cat")]


def pooled(quantized, op="GlobalAveragePool", **attributes):
    g = Build()
    x = g.node("Tanh", [g.input()], "stem")
    inputs = [g.qdq(x, "a") if quantized else x]
    if op == "ReduceMean":
        inputs.append(g.constant("axes", np.int64(attributes.pop("axes"))))
    y = g.node("Flatten", [g.node(op, inputs, "pool", **attributes)], "flat")
    width = {"AveragePool": 256}.get(op, 16)
    y = g.qdq(y, "b")
    return g.model(g.node("Gemm", [y, g.weight("w", (16, width))], "fc", transB=1))


class TestQuantizedInputs:
    @pytest.mark.parametrize(
        "op",
        [
            {"op": "GlobalAveragePool"},
            {"op": "AveragePool", "kernel_shape": [2, 2], "strides": [2, 2]},
            {"op": "ReduceMean", "axes": [2, 3]},
            {"op": "ReduceMean", "axes": [-1, -2]},
        ],
        ids=str,
    )
    def test_pooling(self, op):
        assert found(pooled(True, **op)) == []
        assert found(pooled(False, **op)) == [("L8", SPEED, "pool")]

    def test_a_mean_over_channels_is_no_pooling(self):
        g = Build()
        y = g.node("ReduceMean", [g.input(), g.constant("axes", np.int64([1]))], "mean")
        assert found(g.model(g.conv(g.qdq(y, "b"), "conv", cin=1, cout=16))) == []

    @pytest.mark.parametrize("op", ["Add", "Mul"])
    @pytest.mark.parametrize("sides", [(1, 1), (1, 0), (0, 0)])
    def test_two_tensors(self, op, sides):
        g = Build()
        names = [g.node("Tanh", [g.input(n)], f"stem_{n}") for n in "xy"]
        names = [
            g.qdq(n, f"q{i}") if side else n
            for i, (n, side) in enumerate(zip(names, sides, strict=True))
        ]
        y = g.node(op, names, "join")
        model = g.model(g.conv(g.qdq(y, "b"), "conv"))
        assert found(model) == ([] if all(sides) else [("L8", SPEED, "join")])

    def test_one_side_in_front_of_a_float_reader(self):
        g = Build()
        y = g.node("Mul", [g.qdq(g.input("x"), "a"), g.input("y")], "join")
        assert found(g.model(g.node("Tanh", [y], "tanh"))) == [("L8", SPEED, "join")]

    def test_float_around_it(self):
        g = Build()
        y = g.node("Mul", [g.input("x"), g.input("y")], "join")
        assert found(g.model(g.conv(g.qdq(y, "a"), "conv"), g.node("Tanh", [y], "t"))) == []

    @pytest.mark.parametrize("form", ["silu", "gelu"])
    def test_an_activation_is_no_join(self, form):
        g = Build()
        y = g.conv(g.qdq(g.input(), "a"), "conv")
        if form == "silu":
            y = g.node("Mul", [y, g.node("Sigmoid", [y], "sigmoid")], "join")
        else:
            one = g.constant("one", np.float32(1))
            inner = g.node("Erf", [g.node("Div", [y, one], "div")], "erf")
            half = g.node("Mul", [y, one], "half")
            y = g.node("Mul", [half, g.node("Add", [inner, one], "plus")], "join")
        assert found(g.model(g.conv(g.qdq(y, "b"), "next"))) == []
