"""Each example of a guide's workflow with `--smoke`: the numbers that it prints make sense."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import onnx
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = (
    "ptq_resnet",
    "static_mobilenet",
    "dynamic_lstm",
    "graph_mode_resnet18",
    "partial_quantization",
    "detection_head",
    "vit",
)
ROW = re.compile(r"^(\S.*?)  +(-?[\d.]+|inf)(?: +(-?[\d.]+|inf))?(?: +(-?[\d.]+))?$", re.MULTILINE)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs an example; returns `{row: numbers}` of its tables, its output, and its bars."""

    def run(name, *options):
        pytest.importorskip("sklearn")
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        output = () if name == "partial_quantization" else ("--output", str(tmp_path))
        assert module.main(["--smoke", *output, *options]) == 0
        captured = capsys.readouterr()
        rows = {
            found[0]: tuple(float(number) for number in found[1:] if number)
            for found in ROW.findall(captured.out)
        }
        return rows, captured.out, captured.err

    return run


def size(path):
    return path.stat().st_size


def stored(path):
    """How many weights are stored as int8, of those with at least two dimensions."""
    weights = [w for w in onnx.load(path).graph.initializer if len(w.dims) > 1]
    return sum(w.data_type == onnx.TensorProto.INT8 for w in weights), len(weights)


@pytest.mark.parametrize("name", NAMES)
def test_short_and_explained(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) < 150
    assert lines[2].startswith(f"    python examples/{name}.py")


@pytest.mark.slow
@pytest.mark.parametrize("build", ["quantize", "initialize"])
def test_ptq_resnet(run, tmp_path, build):
    rows, output, bars = run("ptq_resnet", "--build", build)
    accuracy = {name: numbers[0] for name, numbers in rows.items()}
    methods = ["max", "percentile 99.9", "percentile 99.99", "MSE", "entropy"]
    assert list(accuracy)[:6] == ["float32", *methods]
    assert accuracy["float32"] > 80
    best = max(methods, key=accuracy.get)
    assert accuracy[best] > accuracy["float32"] - 2
    assert accuracy[f"{best}, reloaded"] == accuracy[best]
    assert abs(accuracy["int8.onnx in ONNX Runtime"] - accuracy[best]) < 0.5
    assert size(tmp_path / "int8.onnx") < 0.3 * size(tmp_path / "float32.onnx")
    assert "residual additions with quantizers: 4" in output
    # The tutorial's way quantizes a classifier of ten classes, too; `quantize` leaves it float.
    assert f"lint for tensorrt: {int(build == 'initialize')} finding(s)" in output
    # One pass of the data, whatever the number of methods.
    assert len(set(re.findall(r"calibrate \((\w+)\)", bars))) == 1


@pytest.mark.slow
def test_static_mobilenet(run, tmp_path):
    rows, output, _ = run("static_mobilenet")
    loss = {name: numbers[1] for name, numbers in rows.items() if len(numbers) == 2}
    names = ["per tensor, min-max", "per channel, histogram", "fine-tuned (QAT)"]
    assert loss[names[0]] > loss[names[1]] > loss[names[2]]
    assert rows[names[2]][0] > rows["float32"][0] - 1
    assert loss["the same in ONNX Runtime"] == pytest.approx(loss[names[2]], abs=0.01)
    # Narrow layers, each with a scale for every channel.
    assert size(tmp_path / "int8.onnx") < 0.5 * size(tmp_path / "float32.onnx")
    assert "speedup" in output


@pytest.mark.slow
def test_dynamic_lstm(run, tmp_path):
    rows, output, _ = run("dynamic_lstm")
    for name in ("lstm", "transformer"):
        before, after = rows[f"{name}_float32"], rows[f"{name}_int8"]
        assert 1 < after[0] < 150 and after[0] == pytest.approx(before[0], rel=0.01)
        assert after[1] < 0.45 * before[1]
    kinds = [node.op_type for node in onnx.load(tmp_path / "lstm_int8.onnx").graph.node]
    assert kinds.count("DynamicQuantizeLSTM") == 2
    for name in ("lstm", "transformer"):
        weights = onnx.load(tmp_path / f"{name}_int8.onnx").graph.initializer
        # From the size of a square matrix of the network's width on.
        large = {w.name: w.data_type for w in weights if math.prod(w.dims) >= 64 * 64}
        left = [n for n, kind in large.items() if kind == onnx.TensorProto.FLOAT]
        assert left == ["embedding.weight"] and len(large) >= 6
    assert output.count("speedup") == 2
    of_float, of_simulation = zip(*re.findall(r"by ([\d.]+)%.* by ([\d.]+)%", output), strict=True)
    assert all(0 < float(share) < 3 for share in of_float)
    assert all(float(share) < 0.3 for share in of_simulation)


@pytest.mark.slow
def test_graph_mode_resnet18(run, tmp_path):
    rows, output, _ = run("graph_mode_resnet18")
    assert re.findall(r"^(?:conv1|layer\d\S*|fc) +(float|per \w+)$", output, re.MULTILINE) == [
        "per channel",
        "per channel",
        "per tensor",
        "per channel",
        "float",
    ]
    assert "additions with quantizers: 8" in output
    assert rows["int8"][0] > rows["float32"][0] - 2 > 70
    assert rows["int8, saved and loaded"] == rows["int8"]
    assert abs(rows["int8 in onnxruntime"][0] - rows["int8"][0]) < 0.5
    assert rows["layer4.1.conv1.weight"][0] < rows.get("layer4.1.conv2.weight", (99,))[0]
    assert size(tmp_path / "int8.onnx") < 0.3 * size(tmp_path / "float32.onnx")
    # Without an edit of the network, the classifier alone is float.
    quantized, of = stored(tmp_path / "int8.onnx")
    assert (quantized, of) == (20, 21)


@pytest.mark.slow
def test_partial_quantization(run):
    rows, output, _ = run("partial_quantization")
    ranked = re.findall(r"^\d +(\d+) +(?:Conv2d|Linear)", output, re.MULTILINE)
    assert set(ranked[:2]) == {"4", "8"}
    assert set(re.search(r"fisher\): (.*)", output).group(1).split(", ")) == {"4", "8"}
    everything, float32 = rows["int8, all layers"][0], rows["float32"][0]
    assert everything < float32 - 20
    (restored,) = [n for name, (n,) in rows.items() if name.startswith("drop <= 0.5: ")]
    assert restored >= float32 - 0.5
    assert rows[f"float: {', '.join(ranked[:2])}"][0] >= float32 - 0.5


@pytest.mark.slow
def test_detection_head(run, tmp_path):
    rows, output, _ = run("detection_head")
    recall, precision, error = rows["float32"]
    assert recall > 20 and precision > 20 and error < 40
    for name in ("int8", "int8, float head", "detector.onnx"):
        assert rows[name] == pytest.approx(rows["float32"], abs=4)
    assert "one range for /cat#0, /cat#1, join.0" in output
    assert "detector.onnx: ok" in output and "lint: []" in output
    assert stored(tmp_path / "detector.onnx") == (8, 10)


@pytest.mark.slow
def test_vit(run):
    rows, output, _ = run("vit")
    plain = [rows[f"int8, {method}"][1] for method in ("max", "percentile", "mse")]
    assert rows["int8, SmoothQuant"][1] > max(plain) + 10
    assert rows["int8, SmoothQuant"][0] == pytest.approx(rows["float32"][0], abs=2)
    assert rows["int8.onnx in ONNX Runtime"][1] > 25
    assert "softmax inside of an attention" in output
