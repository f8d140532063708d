import numpy as np
import onnx
import onnx_runs
import pytest
from lint_graphs import E4M3, INT8, Build
from onnx import TensorProto

from pytorch_quant.export.lint import lint_onnx

UINT8 = TensorProto.UINT8


def found(model, target):
    return [(f.rule, f.severity, f.node) for f in lint_onnx(model, target)]


def two_convs(kind, op="Conv", quantized_result=True):
    g = Build()
    x = g.qdq(g.input(), "a", kind=kind)
    if op == "Conv":
        y = g.conv(x, "conv")
    else:
        y = g.node(op, [x, g.weight("w", (16, 16, 2, 2), 1)], "conv")
    if quantized_result:
        y = g.node("Relu", [g.qdq(y, "b", kind=kind)], "relu")
    return g.model(y)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_x1_signed_activations(target):
    (finding,) = lint_onnx(two_convs(INT8), target)
    assert (finding.rule, finding.severity) == ("X1", "performance")
    assert finding.message.startswith("2 activations are int8, a/Q the first")
    assert f'fix_onnx(..., target="{target}")' in finding.fix
    assert found(two_convs(UINT8), target) == []
    assert "X1" not in [f.rule for f in lint_onnx(two_convs(INT8))]


def test_x1_transposed_convolutions_of_openvino_stay_signed():
    model = two_convs(INT8, "ConvTranspose", quantized_result=False)
    assert found(model, "openvino") == []
    assert [f[0] for f in found(model, "onnxruntime")] == ["X1", "X3"]


def with_bias(bias, scale=1e-6, dtype=np.float32):
    g = Build()
    x = g.qdq(g.input(), "a", scale=0.1, kind=UINT8)
    w = g.weight("w", (16, 16, 1, 1), scale=np.full(16, scale))
    b = g.constant("bias", np.asarray(bias, dtype))
    y = g.node("Conv", [x, w, b], "conv")
    return g.model(g.node("Relu", [g.qdq(y, "b", scale=1.0, kind=UINT8)], "relu"))


def test_x2_biases_that_saturate():
    bias = np.zeros(16)
    # 2**30 steps of 1e-7.
    bias[3] = 107
    assert found(with_bias(bias), "onnxruntime") == []
    bias[5] = -108
    assert found(with_bias(bias), "onnxruntime") == [("X2", "error", "conv")]
    assert found(with_bias(bias), "openvino") == []
    (finding,) = lint_onnx(with_bias([-108, *[0] * 15]), "onnxruntime")
    assert "1 channels" in finding.message


@pytest.mark.parametrize(("bias", "wrong"), [(100, False), (500, True)])
def test_x2_is_what_onnx_runtime_does(bias, wrong):
    model = with_bias(np.full(16, bias))
    x = np.zeros((1, 16, 8, 8), np.float32)
    expected, got = (onnx_runs.run(model, x, optimize=o)[0] for o in (False, True))
    assert (np.abs(expected - got).max() > 1) == wrong
    assert bool(found(model, "onnxruntime")) == wrong


def test_x3_quantized_and_float_all_the_same():
    alone = two_convs(UINT8, quantized_result=False)
    assert found(alone, "onnxruntime") == [("X3", "performance", "conv")]
    (finding,) = lint_onnx(alone, "onnxruntime")
    assert finding.message.endswith("it runs in float: its result goes to no single Q")
    assert found(alone, "openvino") == []
    assert found(two_convs(UINT8), "onnxruntime") == []
    shifted = two_convs(UINT8, "ConvTranspose")
    shifted.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.uint8(128), "a.zero"))
    assert found(shifted, "openvino") == [("X3", "performance", "conv")]


@pytest.mark.parametrize("batchnorm", [False, True])
def test_x3_names_a_batch_norm_that_is_not_folded(batchnorm):
    g = Build()
    y = g.conv(g.qdq(g.input(), "a", kind=UINT8), "conv")
    if batchnorm:
        y = g.batchnorm(y, "bn")
    model = g.model(g.node("Relu", [g.qdq(y, "b", kind=UINT8)], "relu"))
    assert found(model, "openvino") == []
    findings = lint_onnx(model, "onnxruntime")
    if not batchnorm:
        assert findings == []
        return
    (finding,) = findings
    assert (finding.rule, finding.node) == ("X3", "conv")
    assert finding.message.endswith("a batch norm that is not folded stands behind it")
    assert finding.fix.startswith("fold it before quantize(): fold_batchnorm(")


def test_x3_no_placement_helps_fp8():
    g = Build()
    x = g.qdq(g.input(), "a", kind=E4M3)
    (finding,) = lint_onnx(g.model(g.conv(x, "conv", kind=E4M3, axis=None)), "onnxruntime")
    assert (finding.rule, finding.node) == ("X3", "conv")
    assert "no kernel for FP8" in finding.message and finding.fix.startswith("quantize in INT8")
