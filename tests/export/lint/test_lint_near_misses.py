"""Graphs that come close to what a rule forbids, and are right."""

import numpy as np
import pytest
from lint_graphs import E4M3, INT8, Build, found
from onnx import TensorProto, helper


def linear(a="a", opset=20, shape=(4, 32), scale=0.1, kind=INT8, bias=None, **attributes):
    """`(graph, result)` of a pair and a Gemm."""
    g = Build(opset=opset)
    x = g.qdq(g.input("x", shape), a, scale, kind, **attributes)
    inputs = [x, g.weight("w", (32, 32), None if kind == E4M3 else 0, kind)]
    return g, g.node("Gemm", [*inputs, g.floats("b", (32,))][: 3 if bias else 2], "fc", transB=1)


def test_w2_a_transpose_behind_the_product_or_before_the_pair():
    g = Build()
    x = g.node("Transpose", [g.input("x", (2, 32, 4))], "before", perm=[0, 2, 1])
    y = g.node("MatMul", [g.qdq(x, "a"), g.weight("w", (32, 32), 1)], "fc")
    assert found(g.model(g.node("Transpose", [y], "behind", perm=[0, 2, 1]))) == []


def test_w4_a_scale_for_each_channel_of_the_weight_alone():
    g, y = linear(scale=np.full(1, 0.1))
    assert "W4" not in [rule for rule, *_ in found(g.model(y))]
    g, y = linear()
    assert found(g.model(y)) == []


@pytest.mark.parametrize("added", [False, True])
def test_w5_biases_in_float(added):
    g, y = linear(bias=not added)
    if added:
        y = g.node("Add", [y, g.floats("b", (32,))], "bias")
    assert found(g.model(y)) == []


def test_w6_r3_smallest_scales_are_above_zero():
    g = Build()
    scale = np.full(32, 0.1)
    scale[3] = 1e-30
    weight = g.weight("w", (32, 32), scale=scale)
    y = g.node("Gemm", [g.qdq(g.input("x", (4, 32)), "a"), weight], "fc", transB=1)
    assert found(g.model(y)) == []


@pytest.mark.parametrize("opset", [19, 20, 21, 23, 24])
def test_o2_o5_plain_fp8_in_every_opset(opset):
    g, y = linear(opset=opset, kind=E4M3)
    assert found(g.model(y)) == []


@pytest.mark.parametrize("opset", [13, 23])
def test_o1_o6_no_precision(opset):
    g, y = linear(opset=opset)
    assert found(g.model(y)) == []


def test_l15_a_branch_without_pairs_between_two_pairs():
    g, y = linear()
    branches = {}
    for name, op in (("then", "Exp"), ("else", "Identity")):
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        node = helper.make_node(op, [y], [name])
        branches[f"{name}_branch"] = helper.make_graph([node], name, [], [result])
    y = g.node("If", [g.input("condition", (), TensorProto.BOOL)], "branch", **branches)
    y = g.node("MatMul", [g.qdq(y, "c"), g.weight("v", (32, 32), 1)], "last")
    assert "L15" not in [rule for rule, *_ in found(g.model(y))]


def test_r1_another_domain_that_does_not_quantize():
    g, y = linear()
    assert found(g.model(g.node("FusedGelu", [y], "gelu", domain="com.microsoft"))) == []


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
def test_r4_r5_r7_zero_points_and_scales_of_one_entry(target):
    g = Build()
    g.constant("a.scale", np.full(1, 0.1, np.float32))
    g.constant("a.zero", np.zeros(1, np.int8))
    q = g.node("QuantizeLinear", [g.input("x", (4, 32)), "a.scale", "a.zero"], "a/Q", axis=1)
    x = g.node("DequantizeLinear", [q, "a.scale", "a.zero"], "a/DQ", axis=1)
    y = g.node("Gemm", [x, g.weight("w", (32, 32))], "fc", transB=1)
    assert [f for f in found(g.model(y), target) if f[0] in ("R4", "R5", "R7", "W4")] == []


def test_r11_one_q_with_a_dq_for_each_reader():
    g = Build()
    q = g.q(g.input("x", (4, 32)), "a")
    first = g.dq(q, "a")
    second = g.node("DequantizeLinear", [q, "a.scale", "a.zero"], "again/DQ")
    results = [
        g.node("Gemm", [x, g.weight(f"w{i}", (32, 32))], f"fc{i}", transB=1)
        for i, x in enumerate((first, second))
    ]
    assert "R11" not in [rule for rule, *_ in found(g.model(*results))]


def test_r12_operators_whose_names_begin_alike():
    g = Build()
    x = g.qdq(g.input("x", (4, 32)), "a")
    y = g.node("MatMul", [x, g.weight("w", (32, 32), 1)], "QLinearMatMul")
    assert found(g.model(y)) == []
