import numpy as np
import pytest
from lint_graphs import E4M3, INT4, Build, found

SPEED = "performance"


def one_conv():
    g = Build()
    return g, g.conv(g.qdq(g.input(), "a"), "conv")


def test_a_quantized_convolution_is_clean():
    g, y = one_conv()
    assert found(g.model(g.node("Relu", [y], "relu"))) == []


class TestBothOperands:
    def test_float_weight(self):
        g = Build()
        y = g.node("Conv", [g.qdq(g.input(), "a"), g.floats("w", (16, 16, 3, 3))], "conv")
        assert found(g.model(y)) == [("L1", SPEED, "conv")]

    @pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
    def test_float_data(self, target):
        g = Build()
        y = g.conv(g.input(), "conv")
        assert found(g.model(y), target) == [("L1", "error", "conv")]

    def test_neither(self):
        g = Build()
        y = g.node("Gemm", [g.input("x", (4, 32)), g.floats("w", (32, 32))], "fc")
        assert found(g.model(y)) == []

    def test_the_bias_does_not_count(self):
        g = Build()
        a = g.qdq(g.input("x", (4, 32)), "a")
        y = g.node("Gemm", [a, g.weight("w", (32, 32)), g.floats("b", (32,))], "fc", transB=1)
        assert found(g.model(y)) == []

    def test_weight_only(self):
        g = Build(opset=21)
        scale = np.full((1, 32), 0.01)
        w = g.weight("w", (64, 32), 0, INT4, scale, block_size=64)
        y = g.node("MatMul", [g.input("x", (2, 4, 64)), w], "fc")
        assert found(g.model(y)) == []

    @pytest.mark.parametrize("both", [True, False])
    def test_two_activations(self, both):
        g = Build()
        a = g.qdq(g.input("a", (2, 32, 32)), "qa")
        b = g.input("b", (2, 32, 32))
        y = g.node("MatMul", [a, g.qdq(b, "qb") if both else b], "product")
        assert found(g.model(y)) == ([] if both else [("L1", SPEED, "product")])

    def test_data_behind_operators_that_keep_the_grid(self):
        g = Build()
        a = g.node("MaxPool", [g.qdq(g.input(), "a")], "pool", kernel_shape=[2, 2])
        a = g.node("Transpose", [a], "turn", perm=[0, 1, 3, 2])
        assert found(g.model(g.conv(a, "conv"))) == []

    def test_linear_resize_is_no_way_to_a_dq(self):
        g = Build()
        scales = g.constant("scales", np.float32([1, 1, 2, 2]))
        a = g.qdq(g.input(), "a")
        a = g.node("Resize", [a, "", scales], "resize", mode="linear")
        assert found(g.model(g.conv(a, "conv")))[0] == ("L1", "error", "conv")


class TestAfterWeighted:
    @pytest.mark.parametrize("behind", ["BatchNormalization", "Relu"])
    def test_between_conv_and_what_is_fused(self, behind):
        g, y = one_conv()
        y = g.qdq(y, "b")
        y = g.batchnorm(y, "bn") if behind != "Relu" else g.node("Relu", [y], "relu")
        y = g.conv(g.qdq(y, "c"), "next")
        assert found(g.model(y)) == [("L2", SPEED, "b/Q")]

    def test_between_batchnorm_and_relu(self):
        g, y = one_conv()
        y = g.node("Relu", [g.qdq(g.batchnorm(y, "bn"), "b")], "relu")
        y = g.node("Tanh", [y], "tanh")
        assert [f for f in found(g.model(y)) if f[0] != "L3"] == [("L2", SPEED, "b/Q")]

    def test_for_a_float_operator(self):
        g, y = one_conv()
        y = g.node("Tanh", [g.qdq(g.node("Relu", [y], "relu"), "b")], "tanh")
        assert found(g.model(y)) == [("L2", SPEED, "b/Q")]

    def test_the_input_of_the_next_layer_is_no_output(self):
        g, y = one_conv()
        y = g.conv(g.qdq(g.node("Relu", [y], "relu"), "b"), "next")
        assert found(g.model(y)) == []


class TestOnePair:
    @pytest.mark.parametrize("scale", [0.1, 0.2])
    def test_two_pairs(self, scale):
        g = Build()
        x = g.input()
        left, right = g.conv(g.qdq(x, "a"), "left"), g.conv(g.qdq(x, "b", scale), "right")
        assert found(g.model(left, right)) == [("L5", SPEED, "b/Q")]

    def test_a_shared_pair(self):
        g = Build()
        a = g.qdq(g.input(), "a")
        assert found(g.model(g.conv(a, "left"), g.conv(a, "right"))) == []


class TestOwnPair:
    def test_a_pair_for_pooling(self):
        g = Build()
        y = g.node("MaxPool", [g.qdq(g.input(), "a")], "pool", kernel_shape=[2, 2])
        y = g.node("Identity", [y], "same")
        assert found(g.model(g.conv(g.qdq(y, "b"), "conv"))) == [("L7", SPEED, "pool")]

    def test_a_pair_that_others_read(self):
        g = Build()
        a = g.qdq(g.input(), "a")
        y = g.node("MaxPool", [a], "pool", kernel_shape=[2, 2])
        assert found(g.model(g.conv(g.qdq(y, "b"), "conv"), g.conv(a, "other"))) == []


class TestEnds:
    def test_logits(self):
        g, y = one_conv()
        y = g.node("Flatten", [g.qdq(y, "out")], "flat")
        assert found(g.model(y)) == [("L9", SPEED, "out/DQ")]

    @pytest.mark.parametrize(("cin", "clean"), [(3, False), (32, True)])
    def test_rgb_in_fp8(self, cin, clean):
        g = Build()
        a = g.qdq(g.input("x", (1, cin, 8, 8)), "a", kind=E4M3)
        y = g.conv(a, "conv", cin=cin, cout=32, kind=E4M3, axis=None)
        assert found(g.model(y)) == ([] if clean else [("L9", SPEED, "conv")])

    def test_rgb_in_int8(self):
        g = Build()
        a = g.qdq(g.input("x", (1, 3, 8, 8)), "a")
        assert found(g.model(g.conv(a, "conv", cin=3))) == []


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
@pytest.mark.parametrize("scale", [0.1, 0.2])
def test_requantized(scale, target):
    g = Build()
    y = g.conv(g.qdq(g.qdq(g.input(), "a"), "b", scale), "conv")
    assert found(g.model(y), target) == [("L10", SPEED, "b/Q")]


class TestFloatByDefault:
    @pytest.mark.parametrize("op", ["Softmax", "Exp", "Sigmoid"])
    def test_quantized(self, op):
        g = Build()
        y = g.node(op, [g.qdq(g.input(), "a")], "op")
        assert found(g.model(y)) == [("L11", SPEED, "a/Q")]

    def test_silu(self):
        g, y = one_conv()
        y = g.qdq(y, "b")
        y = g.node("Mul", [y, g.node("Sigmoid", [y], "sigmoid")], "silu")
        assert found(g.model(y)) == [("L11", SPEED, "b/Q")]

    @pytest.mark.parametrize("behind_conv", [True, False])
    def test_layer_norm(self, behind_conv):
        g = Build()
        x = g.input()
        y = g.conv(g.qdq(x, "a"), "conv") if behind_conv else x
        y = g.node("LayerNormalization", [g.qdq(y, "b"), g.floats("s", (8,))], "norm")
        assert found(g.model(y)) == ([] if behind_conv else [("L11", SPEED, "b/Q")])

    def test_a_pair_shared_with_a_layer(self):
        g = Build()
        a = g.qdq(g.input(), "a")
        assert found(g.model(g.node("Sigmoid", [a], "gate"), g.conv(a, "conv"))) == []


@pytest.mark.parametrize(("sides", "clean"), [((1, 1), True), ((1, 0), False), ((0, 0), True)])
def test_l1_einsum(sides, clean):
    g = Build()
    names = [g.input(name, (4, 32, 32)) for name in "ab"]
    names = [g.qdq(n, f"q{n}") if side else n for n, side in zip(names, sides, strict=True)]
    y = g.node("Einsum", names, "product", equation="bij,bjk->bik")
    assert found(g.model(y)) == ([] if clean else [("L1", "performance", "product")])


def test_a_pair_in_front_of_an_einsum_is_read():
    g = Build()
    w = g.weight("w", (32, 32), 1)
    y = g.node("MatMul", [g.qdq(g.input("x", (4, 32, 32)), "a"), w], "fc")
    y = g.node("Transpose", [g.qdq(y, "b")], "turn", perm=[0, 2, 1])
    other = g.qdq(g.input("y", (4, 32, 32)), "c")
    assert found(g.model(g.node("Einsum", [y, other], "product", equation="bij,bjk"))) == []
