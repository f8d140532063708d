import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from lint_graphs import Build, found

from pytorch_quant import calibrate, export_onnx, models
from pytorch_quant.export.lint import NOT_CHECKED, RULES, Finding, lint_onnx


def half_quantized():
    g = Build()
    w = g.constant("w", g.rng.normal(size=(64, 32)).astype(np.float32))
    return g.model(g.node("MatMul", [g.qdq(g.input("x", (4, 64)), "a"), w], "fc"))


def test_a_finding():
    (finding,) = lint_onnx(half_quantized())
    assert finding == Finding(
        "L1",
        "performance",
        "fc",
        "its data comes from a DQ and its weight is float, so it runs in float",
        "enable the _weight_quantizer of this layer, or disable() its _input_quantizer",
    )
    assert str(finding).startswith("L1 performance: fc: its data comes")
    with pytest.raises(AttributeError):
        finding.rule = "L2"


def test_a_node_without_a_name():
    model = half_quantized()
    model.graph.node[-1].name = ""
    assert [f.node for f in lint_onnx(model)] == ["MatMul fc_out"]


def test_files_and_external_data(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    onnx.save(half_quantized(), path)
    assert found(str(path)) == found(path) == found(half_quantized())
    model = half_quantized()
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=0)
    monkeypatch.chdir(tmp_path.parent)
    assert found(path) == found(half_quantized())
    negative = half_quantized()
    negative.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.float32(-1), "a.scale"))
    onnx.save(negative, path, save_as_external_data=True, location="data", size_threshold=0)
    assert ("R3", "error", "a/Q") in found(path)
    in_memory = onnx.load(path, load_external_data=False)
    assert ("R3", "error", "a/Q") not in found(in_memory)
    (tmp_path / "data").unlink()
    with pytest.raises(FileNotFoundError, match=r"data does not exist, and .* keeps"):
        lint_onnx(path)


def test_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError):
        lint_onnx(tmp_path / "none.onnx")
    with pytest.raises(IsADirectoryError):
        lint_onnx(tmp_path)
    for content in (b"not a model at all", b"", b"\x08\x0a"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.onnx is not an ONNX file"):
            lint_onnx(tmp_path / "bad.onnx")


def test_nodes_out_of_order():
    model = half_quantized()
    model.graph.node.insert(0, model.graph.node.pop())
    with pytest.raises(ValueError, match=r"fc reads a/DQ_out before it is made"):
        lint_onnx(model)
    model = half_quantized()
    model.graph.node.append(model.graph.node[-1])
    with pytest.raises(ValueError, match=r"fc makes fc_out again"):
        lint_onnx(model)


def test_unknown_shapes_are_no_finding():
    g = Build()
    a = g.qdq(g.input("x", None), "a")
    y = g.node("MatMul", [a, g.qdq(g.input("y", None), "b")], "product")
    z = g.node("MatMul", [g.qdq(g.input("v", (32,)), "c"), g.weight("w", (32, 32), 1)], "fc")
    kernel = g.qdq(g.input("kernel", None), "d")
    assert found(g.model(y, z, g.node("Conv", [a, kernel], "conv"))) == []


def test_unknown_targets():
    with pytest.raises(ValueError, match=r"one of .*, got 'tensort'; did you mean 'tensorrt'\?"):
        lint_onnx(half_quantized(), "tensort")
    with pytest.raises(ValueError, match="got 'coreml'"):
        lint_onnx(half_quantized(), target="coreml")


def test_the_model_is_not_changed():
    model = half_quantized()
    before = model.SerializeToString()
    lint_onnx(model)
    assert model.SerializeToString() == before


def test_the_table():
    counts = {"R": 13, "O": 6, "F": 6, "W": 7, "L": 15, "H": 7, "X": 3}
    expected = {f"{family}{k}" for family, n in counts.items() for k in range(1, n + 1)}
    assert set(RULES) | set(NOT_CHECKED) == expected and not set(RULES) & set(NOT_CHECKED)
    for rule in RULES.values():
        assert rule.check.__doc__.startswith((f"{rule.id}, ", f"{rule.id}:")), rule.id
        assert rule.severities and len(rule.title) < 80
        assert ("tensorrt" in rule.targets) == (rule.id[0] != "X")
        assert all(severity in rule.check.__doc__ for severity in rule.severities), rule.id


def test_local_functions_are_seen_through():
    model = half_quantized()
    node = model.graph.node.pop()
    function = onnx.helper.make_function(
        "own",
        "Own",
        ["a", "w"],
        ["y"],
        [onnx.helper.make_node("MatMul", ["a", "w"], ["y"])],
        [onnx.helper.make_opsetid("", 20)],
    )
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    call = onnx.helper.make_node("Own", list(node.input), list(node.output), domain="own")
    model.graph.node.append(call)
    assert [f[:2] for f in found(model)] == [("L1", "performance")]


@pytest.mark.slow
def test_an_exported_residual_network_is_clean(tmp_path):
    options = {"small_input": True, "width": 16, "num_classes": 16}
    model, x = models.resnet18(quantize=True, **options).eval(), torch.randn(2, 3, 16, 16)
    calibrate(model, [x], progress=False)
    export_onnx(model, x, tmp_path / "m.onnx")
    findings = lint_onnx(tmp_path / "m.onnx")
    assert {(f.rule, f.severity) for f in findings} == {("L3", "warning")}
    assert len(findings) == 20
    assert {f.rule for f in lint_onnx(tmp_path / "m.onnx", "onnxruntime")} == {"X1", "X3"}
    assert {f.rule for f in lint_onnx(tmp_path / "m.onnx", "openvino")} == {"X1"}


def test_importing_loads_no_onnx():
    code = "import sys, pytorch_quant.export.lint; assert 'onnx' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
