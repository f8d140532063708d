import numpy as np
import onnx
import pytest
from lint_graphs import E2M1, E4M3, INT4, INT8, Build, found
from onnx import TensorProto

ALL = ["tensorrt", "onnxruntime", "openvino"]


def weight_only(kind, opset, shape=(64, 32), block=None, axis=0, scale_kind=None, **options):
    g = Build(opset, ir_version=options.pop("ir_version", 10))
    blocks = [n // block if block and a == axis % len(shape) else n for a, n in enumerate(shape)]
    scale = np.full(blocks if block else (), 0.5, np.float32)
    g.constant("w.scale", scale, scale_kind or TensorProto.FLOAT)
    g.constant("w.zero", np.zeros(scale.shape), kind)
    g.constant("w.codes", g.rng.integers(0, 2, shape), kind)
    attributes = {"axis": axis, "block_size": block} if block else {}
    # E8M0 has no zero point of its own; the codes say the type.
    inputs = ["w.codes", "w.scale"] + ([] if scale_kind else ["w.zero"])
    w = g.node("DequantizeLinear", inputs, "w/DQ", **attributes)
    lead = (2,) * (len(shape) - 2)
    x = g.input("x", (*lead, 4, shape[-2]))
    if kind in (INT8, E4M3) and not block:
        x = g.qdq(x, "a", kind=kind)
    return g.model(g.node("MatMul", [x, w], "fc"))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize(
    ("rule", "kind", "floor"),
    [("O1", INT8, 10), ("O2", E4M3, 19), ("O3", INT4, 21), ("O4", E2M1, 23)],
)
def test_opsets(rule, kind, floor, target):
    kinds = {f[:2] for f in found(weight_only(kind, floor - 1, ir_version=10), target)}
    assert (rule, "error") in kinds and {k for k, _ in kinds} <= {rule}
    assert found(weight_only(kind, floor, ir_version=10), target) == []


@pytest.mark.parametrize("target", ALL)
def test_o1_per_channel(target):
    g = Build(opset=12, ir_version=7)
    a = g.qdq(g.input("x", (4, 32)), "a")
    y = g.node("Gemm", [a, g.weight("w", (32, 32))], "fc", transB=1)
    assert found(g.model(y), target) == [("O1", "error", "w/DQ")]


def test_o3_blocks():
    assert found(weight_only(INT8, 20, block=32)) == [("O3", "error", "w/DQ")]
    assert found(weight_only(INT8, 21, block=32)) == []


def test_o5_rare_formats():
    model = weight_only(E4M3, 24, block=32, scale_kind=TensorProto.FLOAT8E8M0, ir_version=12)
    assert found(model) == [("O5", "warning", "w/DQ")]


def test_o6_precision():
    g = Build(opset=23)
    q = g.q(g.input("x", (4, 32)), "a", precision=TensorProto.FLOAT)
    y = g.node("Gemm", [g.dq(q, "a"), g.weight("w", (32, 32))], "fc", transB=1)
    model = g.model(y)
    assert found(model) == [("O6", "warning", "a/Q")]
    assert found(model, "onnxruntime") == []


def test_f1_nan_codes():
    model = weight_only(E4M3, 19)
    assert found(model) == []
    codes = next(c for c in model.graph.initializer if c.name == "w.codes")
    codes.raw_data = b"\x7f" * 2048
    codes.ClearField("int32_data")
    assert found(model) == [("F1", "error", "w/DQ")]


@pytest.mark.parametrize(("factor", "clean"), [(1.0, True), (0.6, True), (0.4, False)])
def test_f1_range(factor, clean):
    g = Build()
    a = g.qdq(g.input("x", (4, 32)), "a")
    w = g.rng.normal(size=(32, 32)).astype(np.float32)
    scale = np.abs(w).max(1) / 127 * factor
    w = g.qdq(g.constant("w.float", w), "w", scale, axis=0)
    y = g.node("Gemm", [a, w], "fc", transB=1)
    assert found(g.model(y)) == ([] if clean else [("F1", "warning", "w/Q")])


@pytest.mark.parametrize("block", [64, 128])
def test_f2_blocks(block):
    assert found(weight_only(INT4, 21, (128, 32), block)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (64, 32), "block": 32},
        {"shape": (64, 32, 32), "block": 64},
        {"shape": (33, 33)},
    ],
    ids=str,
)
def test_f2_int4(options):
    assert found(weight_only(INT4, 21, **options)) == [("F2", "error", "w/DQ")]


def test_f2_activations():
    g = Build(opset=21)
    a = g.qdq(g.input("x", (4, 64)), "a", kind=INT4)
    y = g.node("MatMul", [a, g.weight("w", (64, 32), None, INT4)], "fc")
    assert found(g.model(y)) == [("F2", "error", "a/Q")]


@pytest.mark.parametrize(("block", "clean"), [(16, True), (32, False)])
def test_f3_fp4_blocks(block, clean):
    model = weight_only(E2M1, 23, block=block)
    assert found(model) == ([] if clean else [("F3", "error", "w/DQ")])


def test_nvfp4_weights_are_two_dq():
    g = Build(opset=23)
    g.constant("global", np.float32(0.1))
    g.constant("blocks", np.ones((4, 32)), E4M3)
    g.constant("codes", np.ones((64, 32)), E2M1)
    scale = g.node("DequantizeLinear", ["blocks", "global"], "scale/DQ")
    w = g.node("DequantizeLinear", ["codes", scale], "w/DQ", axis=0, block_size=16)
    y = g.node("MatMul", [g.input("x", (2, 4, 64)), w], "fc")
    assert found(g.model(y)) == []


@pytest.mark.parametrize(
    ("shape", "clean"), [((4, 64), True), ((1, 2, 4, 64), False), ((4, None), False)]
)
def test_f4_dynamic_quantize(shape, clean):
    g = Build(opset=23)
    scale = g.constant("s", np.float32(1))
    y, _ = g.node(
        "TRT_FP4DynamicQuantize", [g.input("x", shape), scale], "dq", outputs=2, domain="trt"
    )
    model = g.model(g.node("Mystery", [y], "reader", domain="trt"))
    assert found(model) == ([] if clean else [("F4", "error", "dq")])
    model.graph.input.append(onnx.helper.make_tensor_value_info("t", 1, ()))
    model.graph.node[0].input[1] = "t"
    assert found(model) == [("F4", "error", "dq")]


def test_f5_convolutions():
    g = Build(opset=21)
    a = g.qdq(g.input("x", (1, 32, 8, 8)), "a")
    y = g.conv(a, "conv", 32, 32, kind=INT4, axis=None)
    assert found(g.model(y)) == [("F5", "error", "conv")]
    for axis, expected in ((0, [("F5", "performance", "conv")]), (None, [])):
        g = Build()
        a = g.qdq(g.input("x", (1, 32, 8, 8)), "a", kind=E4M3)
        assert found(g.model(g.conv(a, "conv", 32, 32, kind=E4M3, axis=axis))) == expected
