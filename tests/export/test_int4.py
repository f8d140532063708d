from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import nn

from pytorch_quant import INT4_WEIGHT_ONLY, QuantDescriptor, calibrate, export_onnx, lint_onnx
from pytorch_quant import nn as quant_nn
from pytorch_quant.export.int4 import packed, store_blocks


def layer_of(features=(128, 32), **fields):
    fields = {"block_size": 64, **fields}
    layer = quant_nn.QuantLinear(
        *features, quant_desc_weight=INT4_WEIGHT_ONLY.weight.replace(**fields)
    )
    layer._input_quantizer.disable()
    return layer


class Heads(nn.Module):
    """One layer for each form that a weight may have; an export of them all costs as one."""

    def __init__(self, heads):
        super().__init__()
        self.heads = nn.ModuleDict({name: layer_of(**fields) for name, fields in heads.items()})

    def forward(self, x):
        # Two dimensions become a Gemm, three a MatMul.
        return tuple(
            layer(x[:, 0] if name.startswith("gemm") else x) for name, layer in self.heads.items()
        )


FORMS = {
    "32": {"block_size": 32},
    "64": {},
    "128": {"block_size": 128},
    "narrow": {"narrow_range": True},
    "int3": {"num_bits": 3},
    "int8": {"num_bits": 8},
    "fp8": {"num_bits": (4, 3)},
}
HEADS = {f"{kind}_{name}": form for kind in ("gemm", "matmul") for name, form in FORMS.items()}
HEADS["matmul_axis0"] = {"block_size": 32, "axis": 0}


def calibrated(heads=HEADS):
    """Weights with a dead row, and values outside of the range."""
    torch.manual_seed(0)
    model, x = Heads(heads).eval(), torch.randn(4, 3, 128)
    calibrate(model, [x], progress=False)
    with torch.no_grad():
        for layer in model.heads.values():
            layer.weight.mul_(1.3)
            if layer._weight_quantizer.axis == 1:
                layer.weight[3] = 0
                layer._weight_quantizer._amax.reshape(32, -1)[3] = 0
    return model, x


class Exported(NamedTuple):
    model: Heads
    x: torch.Tensor
    path: Path
    report: Any


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The heads by `weights`, for ONNX Runtime."""
    folder, (model, x) = tmp_path_factory.mktemp("int4"), calibrated()
    files = {}
    for weights in ("int8", "float"):
        path = folder / f"{weights}.onnx"
        report = export_onnx(model, x, path, target="onnxruntime", weights=weights)
        files[weights] = Exported(model, x, path, report)
    return files


def network(block=64, features=(128, 32)):
    return nn.Sequential(layer_of(features, block_size=block)).eval()


def np_scale(layer, bound):
    amax = layer._weight_quantizer.amax.numpy().reshape(len(layer.weight), -1)
    scale = amax / np.float32(bound)
    return np.where(scale > 0, scale, scale.max())


def np_codes(layer, bits=4):
    weight = layer.weight.detach().numpy()
    bound = 2 ** (bits - 1) - 1
    scale = np_scale(layer, bound).repeat(layer._weight_quantizer._block_size, 1)
    return np.clip(np.rint(weight / scale), -bound - 1, bound).astype(np.int8)


def unpacked(constant):
    """Two codes to a byte, the low nibble first, in two's complement."""
    content = np.frombuffer(constant.raw_data, np.uint8)
    nibbles = np.stack((content & 15, content >> 4), 1).reshape(-1).astype(np.int8)
    signed = np.where(nibbles > 7, nibbles - 16, nibbles)
    return signed[: int(np.prod(constant.dims))].reshape(constant.dims)


def opened(path):
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    return file, {c.name: c for c in file.graph.initializer}


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def dq_of(file, head):
    return next(
        n for n in file.graph.node if n.name.startswith(f"heads.{head}._weight_quantizer/D")
    )


@pytest.mark.parametrize("kind", ["gemm", "matmul"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_packed_codes_are_those_of_the_formula(exported, block, kind):
    model, _, path, report = exported["int8"]
    file, constants = opened(path)
    assert report.opset >= 21
    layer, dq = model.heads[f"{kind}_{block}"], dq_of(file, f"{kind}_{block}")
    codes, scale, zero_point = (constants[name] for name in dq.input)
    expected, scales, axis = np_codes(layer), np_scale(layer, 7), 1
    product = next(n for n in file.graph.node if dq.output[0] in n.input)
    if kind == "matmul":
        # The Transpose before a MatMul is applied to codes and scales.
        expected, scales, axis = expected.T, scales.T, 0
        assert product.op_type == "MatMul"
    else:
        assert product.op_type == "Gemm" and attributes(product)["transB"] == 1
    assert attributes(dq) == {"axis": axis, "block_size": block}
    assert codes.data_type == zero_point.data_type == TensorProto.INT4
    assert len(codes.raw_data) == expected.size // 2
    np.testing.assert_array_equal(unpacked(codes), expected)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(codes).astype(np.int8), expected)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(scale), scales)
    assert list(zero_point.dims) == list(scales.shape) and not any(zero_point.raw_data)


@pytest.mark.parametrize("weights", ["int8", "float"])
def test_runs_as_it_was_simulated(exported, weights):
    model, x, path, report = exported[weights]
    count = len(HEADS)
    assert report.integer_weights == (count if weights == "int8" else 0)
    assert report.quantize_nodes == (count if weights == "float" else 0)
    assert report.dequantize_nodes == count
    file, _ = opened(path)
    assert "Transpose" not in {n.op_type for n in file.graph.node}
    expected = [y.detach().numpy() for y in model(x)]
    reference = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: x.numpy()})
    engines = [reference]
    if weights == "int8" or not onnx_runs.OLD_KERNELS:
        engines.append(onnx_runs.run(path, x.numpy()))
    for outputs in engines:
        for name, got, wanted in zip(HEADS, outputs, expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-6, err_msg=name)


def test_blocks_along_the_other_axis(exported):
    file, _ = opened(exported["int8"].path)
    assert attributes(dq_of(file, "matmul_axis0")) == {"axis": 1, "block_size": 32}


def test_optimized_runs_agree_where_activations_stay_float(exported):
    model, x, path, _ = exported["int8"]
    options = onnx_runs.ort.SessionOptions()
    # By default the fused operator quantizes activations to int8 in blocks.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnx_runs.ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    for got, wanted in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
        np.testing.assert_allclose(got, wanted.detach(), atol=1e-5)


@pytest.mark.parametrize("weights", ["int8", "float"])
def test_lint_has_nothing_to_say_for_tensorrt(tmp_path, weights):
    heads = {n: f for n, f in HEADS.items() if n.endswith(("_64", "_128"))}
    export_onnx(*calibrated(heads), tmp_path / "m.onnx", target="tensorrt", weights=weights)
    assert lint_onnx(tmp_path / "m.onnx", "tensorrt") == []


def test_tensorrt_has_no_blocks_of_32(tmp_path):
    told = (
        r"heads\.gemm_32\._weight_quantizer\. TensorRT takes INT4 in blocks of 64 or 128 .*not 32"
    )
    with pytest.raises(ValueError, match=told):
        export_onnx(*calibrated({"gemm_32": FORMS["32"]}), tmp_path / "m.onnx", target="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_an_eighth_of_the_size_and_one_amax_for_all_blocks(tmp_path):
    model, x = network(features=(1024, 1024)), torch.randn(4, 1024)
    model[0]._weight_quantizer.amax = 0.05
    small = export_onnx(model, x, tmp_path / "m.onnx").size
    assert 1 / 8 < small / (4 * 1024 * 1024) < 1 / 6.9
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=2e-6)


def test_float16_weights(tmp_path):
    model, x = calibrated({"gemm_64": {}, "matmul_64": {}})
    export_onnx(model.half(), x.half(), tmp_path / "m.onnx", target="onnxruntime")
    _, constants = opened(tmp_path / "m.onnx")
    kinds = {c.data_type for name, c in constants.items() if name.endswith("scale")}
    assert kinds == {TensorProto.FLOAT16}
    outputs = onnx_runs.run(tmp_path / "m.onnx", x.half().numpy())
    for got, wanted in zip(outputs, model(x.half()), strict=True):
        np.testing.assert_allclose(got, wanted.detach(), atol=4e-3)


def test_a_layer_that_runs_twice_is_stored_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer_of((64, 64))

        def forward(self, x):
            return self.layer(self.layer(x))

    model, x = Twice().eval(), torch.randn(2, 3, 64)
    calibrate(model, [x], progress=False)
    report = export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    assert report.integer_weights == report.dequantize_nodes == 1
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    np.testing.assert_allclose(got, model(x).detach(), atol=2e-6)


def test_a_plain_export_holds_the_pair(tmp_path):
    model, x = calibrated({"gemm_64": {}, "matmul_64": {}})
    path = tmp_path / "m.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, opset_version=21, verbose=False)
    file, constants = opened(path)
    pairs = [n for n in file.graph.node if n.op_type.endswith("tizeLinear")]
    assert sorted(n.op_type for n in pairs) == ["DequantizeLinear"] * 2 + ["QuantizeLinear"] * 2
    for node in pairs:
        assert attributes(node) == {"axis": 1, "block_size": 64}
        assert constants[node.input[2]].data_type == TensorProto.INT4
    assert pairs[0].input[0] == "heads.gemm_64.weight"
    for got, wanted in zip(onnx_runs.run(path, x.numpy()), model(x), strict=True):
        np.testing.assert_allclose(got, wanted.detach(), atol=2e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"writes (18|20); pass opset_version=21, or use export_onnx"),
        ({"opset_version": 18}, "writes 18; pass opset_version=21, or use export_onnx"),
        ({"dynamo": False, "opset_version": 20}, "dynamo=False.*does not write; use export_onnx"),
    ],
)
def test_a_plain_export_to_an_older_opset_is_refused(tmp_path, options, message):
    model, x = calibrated({"gemm_64": {}})
    with pytest.raises(Exception) as error:
        options = {"dynamo": True, **options}
        torch.onnx.export(model, (x,), tmp_path / "m.onnx", verbose=False, **options)
    told = error.value if isinstance(error.value, ValueError) else error.value.__cause__
    with pytest.raises(ValueError, match=rf"gemm_64\._weight_quantizer: blocks need.*{message}"):
        raise told


def test_export_onnx_to_an_older_opset_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"opset=20 is too low for a model in.*opset=21"):
        export_onnx(*calibrated({"gemm_64": {}}), tmp_path / "m.onnx", opset=20)
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="length 100, which is not a multiple of block_size=64"):
        calibrate(network(features=(100, 8)), [torch.randn(2, 100)], progress=False)


def test_activations_in_blocks_are_refused(tmp_path):
    desc = QuantDescriptor(4, axis=1, block_size=4)
    model = nn.Sequential(quant_nn.QuantLinear(8, 8, quant_desc_input=desc))
    calibrate(model, [torch.randn(2, 8)], progress=False)
    with pytest.raises(ValueError, match=r"0\._input_quantizer: .*block"):
        export_onnx(model, torch.randn(2, 8), tmp_path / "m.onnx")


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_packing_against_the_onnx_package(count):
    codes = np.random.default_rng(count).integers(-8, 8, (count, 3)).astype(np.int8)
    ours = packed(codes, TensorProto.INT4)
    theirs = onnx.helper.make_tensor("w", TensorProto.INT4, codes.shape, codes.reshape(-1))
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(ours).astype(int), onnx.numpy_helper.to_array(theirs).astype(int)
    )
    np.testing.assert_array_equal(unpacked(ours), codes)


def test_weights_that_are_no_constants_stay(tmp_path):
    """A Q with blocks on a graph input has no weight to store."""
    scale = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "scale")
    zeros = packed(np.zeros((2, 2), np.int8), TensorProto.INT4)
    zeros.name = "zeros"
    inputs = ["x", "scale", "zeros"]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", inputs, ["q"], axis=1, block_size=4),
        onnx.helper.make_node("DequantizeLinear", ["q", *inputs[1:]], ["y"], axis=1, block_size=4),
    ]
    infos = [onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 8]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], [scale, zeros])
    before = graph.SerializeToString()
    assert store_blocks(graph) == 0
    assert graph.SerializeToString() == before
