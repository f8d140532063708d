"""Each command on small models, from a model to checked files."""

import argparse
import importlib.util
import json

import command_models
import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from pytorch_quant import cli
from pytorch_quant.commands import report
from pytorch_quant.commands.preparation import ready
from pytorch_quant.commands.rule_files import read_rules

SPEC = "command_models:build"


@pytest.fixture
def run(capsys):
    def run(*words):
        capsys.readouterr()
        try:
            code = cli.main([*map(str, words)])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def as_json(run):
    def as_json(*words, code=0):
        found, out, err = run(*words, "--json")
        assert found == code, err
        return json.loads(out)

    return as_json


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of `quantize`, with the data."""
    folder = tmp_path_factory.mktemp("made")
    command_models.arrays(folder / "d.npz")
    (folder / "rules.yaml").write_text('{"block.conv": INT8_PER_TENSOR, "": INT8}')
    words = f"quantize {SPEC} --data d --evaluate d --rules r --output o --float --verify"
    places = {"d": folder / "d.npz", "r": folder / "rules.yaml", "o": folder / "out"}
    code = cli.main([str(places.get(word, word)) for word in words.split()])
    assert code == 0
    return folder


def constants(path):
    return {c.name: numpy_helper.to_array(c) for c in onnx.load(path).graph.initializer}


def test_quantize_writes_what_it_says(made):
    names = {path.name for path in (made / "out").iterdir()}
    assert names == {"quantized.pt", "quantized.onnx", "float.onnx", "report.txt", "report.json"}
    data = json.loads((made / "out" / "report.json").read_text())
    assert data["ok"] and data["verify"]["ok"] and data["lint"]["counts"]["error"] == 0
    assert data["settings"]["rules"] == {"block.conv": "INT8_PER_TENSOR", "": "INT8"}
    text = (made / "out" / "report.txt").read_text()
    for part in ("block.conv._weight_quantizer", "compared code by code", "top-1 %"):
        assert part in text


def test_quantize_calibrates_and_exports(made):
    x = np.load(made / "d.npz")["x"]
    held = torch.load(made / "out" / "quantized.pt", weights_only=True)
    assert held["model"]["stem._input_quantizer._amax"] == np.abs(x).max()
    # One rule: a single amax; the other: one for each channel.
    assert held["model"]["block.conv._weight_quantizer._amax"].numel() == 1
    assert held["model"]["stem._weight_quantizer._amax"].numel() == 16
    scale = constants(made / "out" / "quantized.onnx")["stem._input_quantizer.scale"]
    assert scale == np.abs(x).max() / np.float32(127)
    # Batch norm is folded before, so that no node of it is left.
    kinds = [node.op_type for node in onnx.load(made / "out" / "quantized.onnx").graph.node]
    assert "BatchNormalization" not in kinds and kinds.count("QuantizeLinear") >= 3


def test_quantize_measures_accuracy(made):
    data = np.load(made / "d.npz")
    accuracy = json.loads((made / "out" / "report.json").read_text())["accuracy"]
    for name in ("float", "quantized"):
        path = made / "out" / f"{name}.onnx"
        logits = [onnx_runs.run(path, x[None])[0][0] for x in data["x"]]
        expected = 100 * np.mean(np.argmax(logits, 1) == data["labels"])
        # One sample may lie on the edge between two classes.
        assert accuracy[name] == pytest.approx(expected, abs=100 / 24 + 1e-6)


def test_a_float_checkpoint_and_other_options(as_json, tmp_path):
    command_models.arrays(tmp_path / "d.npz", 8)
    torch.manual_seed(9)
    model = command_models.Net(4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")
    data = as_json(
        *("quantize", SPEC, "--model-arg", "classes=4", "--weights", tmp_path / "w.pt"),
        *("--data", tmp_path / "d.npz", "--target", "onnxruntime", "--dynamic-batch"),
        *("--method", "percentile", "--method-option", "percentile=50", "--opset", 20),
        *("--output", tmp_path / "deep" / "out", "-q"),
    )
    assert data["export"]["opset"] == 20 and data["settings"]["method_options"] == {
        "percentile": 50
    }
    ranges = {row["name"]: row for row in data["calibration"]["ranges"]}
    assert ranges["stem._input_quantizer"]["clipped"] == pytest.approx(0.5, abs=0.01)
    file = tmp_path / "deep" / "out" / "quantized.onnx"
    (shape,) = [v.type.tensor_type.shape for v in onnx.load(file).graph.input]
    assert shape.dim[0].dim_param and shape.dim[1].dim_value == 3
    stored = torch.load(tmp_path / "deep" / "out" / "quantized.pt", weights_only=True)["model"]
    assert torch.equal(stored["stem.weight"], model.stem.weight)


def test_several_inputs(as_json, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 32)).astype(np.float32)
    np.savez(tmp_path / "d.npz", codes=rng.integers(0, 7, (6, 3)), x=x)
    spec = "command_models:two_inputs"
    words = "--data", tmp_path / "d.npz", "--output", tmp_path / "out", "-q"
    data = as_json("quantize", spec, *words)
    assert data["export"]["quantized_layers"] == 1
    file = tmp_path / "out" / "quantized.onnx"
    checkpoint = tmp_path / "out" / "quantized.pt"
    assert as_json("verify", file, spec, "--checkpoint", checkpoint, "-q")["ok"]


def test_verify(as_json, run, made):
    file, checkpoint = made / "out" / "quantized.onnx", made / "out" / "quantized.pt"
    words = "verify", file, SPEC, "--checkpoint", checkpoint, "--engine", "onnxruntime", "-q"
    found = as_json(*words, "--data", made / "d.npz")
    assert found["ok"] and found["quantizers"] >= 3 and found["first_divergence"] is None
    assert as_json(*words)["ok"]


def test_verify_names_what_differs(run, made, tmp_path):
    model = onnx.load(made / "out" / "quantized.onnx")
    for constant in model.graph.initializer:
        if constant.name == "block.conv._input_quantizer.scale":
            wrong = 1.3 * numpy_helper.to_array(constant)
            constant.CopyFrom(numpy_helper.from_array(wrong.astype(np.float32), constant.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    code, out, _ = run(
        *("verify", tmp_path / "wrong.onnx", SPEC, "--engine", "onnxruntime", "-q"),
        *("--checkpoint", made / "out" / "quantized.pt"),
    )
    assert code == 1 and "NOT what torch computes" in out and "block" in out


def test_verify_needs_inputs(run, made):
    code, out, err = run("verify", made / "out" / "quantized.onnx", SPEC)
    assert code == 2 and out == "" and "add --data" in err


def test_summary(as_json, run, made):
    checkpoint = made / "out" / "quantized.pt"
    found = as_json("summary", SPEC, "--checkpoint", checkpoint)
    rows = {row["quantizer"]: row for row in found["rows"]}
    largest = float(np.abs(np.load(made / "d.npz")["x"]).max())
    assert rows["stem._input_quantizer"]["amax"] == [pytest.approx(largest)] * 2
    assert found["uncalibrated"] == []
    assert as_json("summary", SPEC)["quantizers"] == 0
    assert run("summary", SPEC, "--checkpoint", checkpoint, "--weights", "w")[0] == 2


def test_a_checkpoint_that_does_not_fit(run, made, tmp_path):
    torch.save(command_models.Net(10).state_dict(), tmp_path / "float.pt")
    code, _, err = run("summary", SPEC, "--checkpoint", tmp_path / "float.pt")
    assert code == 1 and "does not say how the model was placed" in err
    other = "--model-arg", "classes=16", "--checkpoint", made / "out" / "quantized.pt"
    code, _, err = run("summary", SPEC, *other)
    assert code == 1 and "fc.weight (10, 256) for (16, 256)" in err
    code, _, err = run("summary", SPEC, "--weights", made / "out" / "quantized.pt")
    assert code == 1 and "holds a quantized model" in err and "as --checkpoint" in err


def test_sensitivity_writes_rules(as_json, made, tmp_path):
    (tmp_path / "base.yaml").write_text('{"": INT8, "stem": INT8_PER_TENSOR, "block*": INT8}')
    words = "sensitivity", SPEC, "--data", made / "d.npz", "-q"
    found = as_json(
        *words,
        *("--rules", tmp_path / "base.yaml", "--exclude", 2, "--write-rules", tmp_path / "r.yaml"),
    )
    scores = [row["score"] for row in found["rows"]]
    assert scores == sorted(scores) and len(scores) >= 4
    worst = [row["name"] for row in found["rows"][:2]]
    assert found["excluded"] == worst
    rules = read_rules(tmp_path / "r.yaml")
    assert {name for name, scheme in rules.items() if scheme is None} == set(worst)
    assert rules["block*"] == "INT8" and list(rules)[-2:] == worst
    # The next ranking does not have them.
    left = as_json(*words, "--rules", tmp_path / "r.yaml")
    assert not {row["name"] for row in left["rows"]} & set(worst)


@pytest.mark.parametrize("by", ["loss", "fisher", "evaluate"])
def test_sensitivity_of_a_checkpoint(as_json, made, by):
    found = as_json(
        *("sensitivity", SPEC, "--data", made / "d.npz", "--by", by, "-q", "--max-drop", 100),
        *("--checkpoint", made / "out" / "quantized.pt", "--batch-size", 8),
    )
    assert found["method"] == by and found["excluded"] == []
    # What the checkpoint was placed by stays.
    assert found["rules"] == {"block.conv": "INT8_PER_TENSOR", "": "INT8"}
    if by == "evaluate":
        accuracy = json.loads((made / "out" / "report.json").read_text())["accuracy"]
        assert found["reference"] == pytest.approx(accuracy["float"], abs=100 / 24 + 1e-6)


def test_labels_that_are_no_classes_of_the_model(run, tmp_path):
    x, labels = command_models.arrays(tmp_path / "d.npz", 8)
    np.savez(tmp_path / "d.npz", x=x, labels=labels + 90)
    for by in ("loss", "fisher", "evaluate"):
        words = "sensitivity", SPEC, "--data", tmp_path / "d.npz", "--by", by, "-q"
        code, _, err = run(*words, "--samples", 1)
        assert code == 1 and "classes and the model 10 logits" in err


def test_work_is_not_begun_that_cannot_be_ended(run, tmp_path, monkeypatch):
    x, _ = command_models.arrays(tmp_path / "d.npz", 4)
    np.savez(tmp_path / "unlabelled.npz", x=x)
    monkeypatch.chdir(tmp_path)

    def calibrate(*args, **kwargs):
        raise AssertionError("calibrated")

    monkeypatch.setattr("pytorch_quant.commands.preparation.calibrate", calibrate)
    data, unlabelled = ("--data", "d.npz"), ("--data", "unlabelled.npz")
    for code, message, words in (
        (1, "nowhere does not exist", ["report", *data, "--output", "nowhere/r.html"]),
        (1, "is a folder", ["report", *data, "--output", "."]),
        (1, "need labels", ["report", *unlabelled, "--accuracy"]),
        (1, "need labels", ["sensitivity", *unlabelled, "--by", "fisher"]),
        (1, "nowhere", ["sensitivity", *data, "--exclude", 1, "--write-rules", "nowhere/r.yaml"]),
        (2, "at least 0, got nan", ["sensitivity", *data, "--max-drop", "nan"]),
        (1, "need labels", ["quantize", *data, "--evaluate", "unlabelled.npz"]),
        (1, "/proc/self: ", ["quantize", *data, "--output", "/proc/self"]),
    ):
        command, *rest = words
        found, out, err = run(command, SPEC, *rest)
        assert found == code and "calibrated" not in out and message in err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"d.npz", "unlabelled.npz"}


def test_data_that_the_model_cannot_take(run, tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 1, 4, 4), np.float16))
    words = "--data", tmp_path / "d.npz", "-q", "--output", tmp_path / "out"
    for command in ("quantize", "report", "sensitivity"):
        given = words if command != "sensitivity" else words[:3]
        code, _, err = run(command, SPEC, *given)
        assert code == 1 and err.count("\n") == 1
        assert "Net cannot run on a batch of" in err and "d.npz, float16 (4, 1, 4, 4)" in err


def test_a_checkpoint_of_a_model_with_other_inputs(run, made):
    checkpoint = made / "out" / "quantized.pt"
    code, _, err = run("summary", "command_models:two_inputs", "--checkpoint", checkpoint)
    assert code == 1 and "quantized.pt was made of a model with other inputs than TwoInputs" in err


def test_sensitivity_options_that_do_not_go_together(run, made):
    words = "sensitivity", SPEC, "--data", made / "d.npz"
    for wrong, message in (
        (["--exclude", 1, "--max-drop", 1], "either --exclude or --max-drop"),
        (["--write-rules", "r.yaml"], "needs --exclude or --max-drop"),
        (["--checkpoint", "c.pt", "--method", "mse", "--target", "openvino"], "--method, --target"),
    ):
        code, out, err = run(*words, *wrong)
        assert code == 2 and out == "" and message in err


def test_lint_fails_on_errors_alone(as_json, run, made, tmp_path):
    file = made / "out" / "quantized.onnx"
    code, out, _ = run("lint", file)
    assert code == 0 and out.endswith("\n") and "for tensorrt: " in out
    model = onnx.load(file)
    (scale,) = [c for c in model.graph.initializer if c.name == "stem._input_quantizer.scale"]
    scale.CopyFrom(numpy_helper.from_array(np.float32(-1), scale.name))
    bad = tmp_path / "bad.onnx"
    onnx.save(model, bad)
    found = as_json("lint", bad, code=1)
    assert found["counts"]["error"] >= 1
    assert {"rule", "severity", "node", "message", "fix"} <= set(found["findings"][0])


def test_fix(as_json, run, made, tmp_path):
    file, fixed = made / "out" / "quantized.onnx", tmp_path / "fixed.onnx"
    found = as_json("fix", file, fixed, "--target", "onnxruntime")
    assert found["path"] == str(fixed) and found["repairs"]
    assert "error" not in {finding["severity"] for finding in found["findings"]}
    x = np.load(made / "d.npz")["x"][:1]
    np.testing.assert_array_equal(onnx_runs.run(fixed, x), onnx_runs.run(file, x))
    model = onnx.load(file)
    (scale,) = [c for c in model.graph.initializer if c.name == "stem._input_quantizer.scale"]
    scale.CopyFrom(numpy_helper.from_array(np.float32(-1), scale.name))
    onnx.save(model, tmp_path / "bad.onnx")
    code, out, _ = run("fix", tmp_path / "bad.onnx", tmp_path / "out.onnx")
    assert code == 1 and "findings left: 1 error" in out and (tmp_path / "out.onnx").exists()


def test_predict(as_json, made):
    found = as_json("predict", made / "out" / "quantized.onnx")
    ops = {row["op"]: row["int8"] for row in found["rows"]}
    assert ops["Conv"] and 0 < found["share"] <= 1
    assert as_json("predict", made / "out" / "float.onnx")["share"] == 0


def test_bench(as_json, run, made):
    files = made / "out" / "float.onnx", made / "out" / "quantized.onnx"
    found = as_json("bench", *files, "--rounds", 3, "--warmup", 0, "--threads", 1, "-q")
    assert [row["path"] for row in found["rows"]] == [str(file) for file in files]
    assert found["rounds"] == 3 and found["shapes"] == {"x": [1, 3, 4, 4]}
    first, second = found["rows"]
    assert second["speedup"] == pytest.approx(first["median"] / second["median"])
    assert second["size"] == files[1].stat().st_size
    assert run("bench", *files, "--shape", "x=1,0")[0] == 2
    assert "a whole number, got 'a'" in run("bench", *files, "--shape", "x=1,a")[2]
    if importlib.util.find_spec("tensorrt") is None:
        code, _, err = run("bench", *files, "--engine", "tensorrt", "-q")
        assert code == 1 and err.endswith("install it with pip install tensorrt\n")
    assert run("bench", *files, "--rounds", "0")[0] == 2


def test_report(as_json, run, made, tmp_path):
    page = tmp_path / "r.html"
    words = "--data", made / "d.npz", "--samples", 8, "--output", page, "--accuracy", "-q"
    found = as_json("report", SPEC, *words, "--checkpoint", made / "out" / "quantized.pt")
    assert found["path"] == str(page) and "stem" in page.read_text()
    assert len(found["accuracy"]) == 2
    # What stays float, and why, needs the float model and the rules.
    assert 'data-label="why"' in page.read_text()
    (tmp_path / "r.yaml").write_text('{"torch.nn.Linear": INT8, "block.conv": null}')
    as_json("report", SPEC, *words, "--rules", tmp_path / "r.yaml")
    assert ">a rule</td>" in page.read_text()


@pytest.mark.parametrize("keep", [[], ["--keep-batchnorm"]])
def test_the_float_model_of_a_checkpoint(run, made, tmp_path, keep):
    words = SPEC, "--data", made / "d.npz", "--output", tmp_path / "out", "-q"
    weights = command_models.Net(10)
    nn.init.uniform_(weights.block.bn.weight, 0.5, 2.0)
    torch.save(weights.state_dict(), tmp_path / "w.pt")
    assert run("quantize", *words, "--weights", tmp_path / "w.pt", *keep)[0] == 0
    parser = argparse.ArgumentParser()
    report.add(parser.add_subparsers())
    checkpoint = tmp_path / "out" / "quantized.pt"
    options = ["report", *map(str, words), "--checkpoint", str(checkpoint)]
    prepared = ready(parser.parse_args(options), keep_float=True)
    x = torch.from_numpy(np.load(made / "d.npz")["x"])
    assert type(prepared.float_model.stem) is nn.Conv2d
    with torch.inference_mode():
        assert torch.allclose(prepared.float_model(x), weights.eval()(x), atol=1e-5)


def test_a_page_beside_the_files(as_json, tmp_path, monkeypatch):
    command_models.arrays(tmp_path / "d.npz", 8)
    seen = {}

    def report(model, batches, path, **options):
        seen.update(options, batches=len(batches))
        path.write_text("page")

    monkeypatch.setattr("pytorch_quant.html_report.report", report)
    (tmp_path / "r.yaml").write_text("torch.nn.Linear: INT8\nstem: null")
    data = as_json(
        *("quantize", SPEC, "--data", tmp_path / "d.npz", "--batch-size", 2, "--html", "-q"),
        *("--rules", tmp_path / "r.yaml"),
        *("--evaluate", tmp_path / "d.npz", "--output", tmp_path / "out"),
    )
    assert data["files"]["html"] == str(tmp_path / "out" / "report.html")
    assert seen["batches"] == 4 and list(seen["accuracy"]) == ["float", "quantized"]
    assert type(seen["float_model"].fc) is nn.Linear
    assert seen["rules"] == {nn.Linear: "INT8", "stem": None}


def test_wrong_things_are_said_before_the_work(run, tmp_path, monkeypatch):
    command_models.arrays(tmp_path / "d.npz", 4)
    monkeypatch.chdir(tmp_path)
    for wrong, message in (
        (["--method-option", "percentile=3"], "no option 'percentile'"),
        (["--rules", "none.yaml"], "none.yaml: No such file"),
        (["--weights", "none.pt"], "none.pt"),
        (["--evaluate", "none.npz"], "none.npz: No such file"),
    ):
        code, _, err = run("quantize", SPEC, "--data", "d.npz", *wrong)
        assert code == 1 and message in err and err.count("\n") == 1
        assert not (tmp_path / "runs").exists()
    (tmp_path / "r.yaml").write_text("nothing.like.it: INT8")
    code, _, err = run("quantize", SPEC, "--data", "d.npz", "--rules", "r.yaml", "--output", "out")
    assert code == 1 and "nothing.like.it" in err and not (tmp_path / "out").exists()


def test_an_interrupt_leaves_whole_files_only(run, tmp_path, monkeypatch):
    command_models.arrays(tmp_path / "d.npz", 4)
    words = "quantize", SPEC, "--data", tmp_path / "d.npz", "--output", tmp_path / "out", "-q"

    def half(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        assert run(*words)[0] == 130
    # The ONNX file was whole by then.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["quantized.onnx"]
    onnx.checker.check_model(onnx.load(tmp_path / "out" / "quantized.onnx"))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_models.Net, "forward", interrupted)
    assert run(*words[:-2], tmp_path / "new", "-q")[0] == 130
    assert not (tmp_path / "new").exists()


def test_progress_goes_to_stderr(run, made):
    words = "sensitivity", SPEC, "--data", made / "d.npz", "--json"
    code, out, err = run(*words)
    assert code == 0 and "calibrate (max)" in err and json.loads(out)
    assert "calibrate" not in run(*words, "-q")[2]
