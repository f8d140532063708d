import sys

import numpy as np
import onnx
import onnx_runs
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from pytorch_quant import cli
from pytorch_quant.demo import flow
from pytorch_quant.demo.digits import load_digits


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        kept = {}
        patch.setattr(flow, "_deploy", _keeping(flow._deploy, kept))
        found = flow.run_demo(tmp_path_factory.mktemp("demo"), quick=True)
    return found, kept["int8"]


def _keeping(deploy, kept):
    def wrapped(model, int8, *rest):
        kept["int8"] = int8
        return deploy(model, int8, *rest)

    return wrapped


@pytest.mark.slow
def test_accuracy(result):
    accuracy = result[0].accuracy
    assert next(iter(accuracy)) == "float32" and len(accuracy) == 12
    assert accuracy["float32"] >= 95
    int8 = [v for k, v in accuracy.items() if k.startswith("int8")]
    four = [v for k, v in accuracy.items() if k.startswith("4-bit, ")]
    assert max(int8) >= accuracy["float32"] - 1
    assert max(four) - min(four) > 0.5
    assert accuracy["4-bit after fine-tuning"] >= max(four)


@pytest.mark.slow
def test_the_file_predicts_as_the_simulation(result):
    found, int8 = result
    _, test = load_digits()
    simulated = int8(test.images).argmax(1).numpy()
    path = found.folder / "int8.onnx"
    (off,) = onnx_runs.run(path, test.images.numpy())
    (on,) = onnx_runs.run(path, test.images.numpy(), optimize=True)
    assert (off.argmax(1) == simulated).all()
    assert (on.argmax(1) == simulated).mean() >= 0.995
    assert found.agreement_unoptimized == 100.0
    assert found.agreement == pytest.approx(100 * np.mean(on.argmax(1) == simulated), abs=0.2)


@pytest.mark.slow
def test_files(result):
    found, int8 = result
    names = {p.name for p in found.folder.iterdir()}
    assert names == {"int8.onnx", "float32.onnx", "int8.pt", "histograms.png", "accuracy.png"}
    onnx.checker.check_model(onnx.load(found.folder / "int8.onnx"))
    assert found.sizes[1] < 0.35 * found.sizes[0]
    state = torch.load(found.folder / "int8.pt", weights_only=True)
    fresh = flow.build(quantize=True)
    fresh.load_state_dict(state)
    _, test = load_digits()
    assert torch.equal(fresh.eval()(test.images[:8]), int8(test.images[:8]))
    for name in ("histograms.png", "accuracy.png"):
        assert (found.folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_table(result):
    text = str(result[0])
    for row in ("float32", "int8, percentile 99.99", "4-bit, entropy", "int8 file in ONNX Runtime"):
        assert row in text


def test_what_runs_the_file_is_asked_for_before_the_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(flow, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ImportError, match=r"needs onnxruntime.*pytorch-quant\[onnxruntime\]"):
        flow.run_demo(tmp_path / "demo", quick=True)
    assert not (tmp_path / "demo").exists()


def test_command_line(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(
        "pytorch_quant.demo.run_demo", lambda folder, quick: called.append((folder, quick)) or "ok"
    )
    assert cli.main(["demo", "--quick", "--output", "there"]) == 0
    assert called == [("there", True)] and capsys.readouterr().out == "ok\n"


def test_command_line_failures_are_one_line(monkeypatch, capsys):
    def fail(folder, quick):
        raise ImportError("this needs sklearn")

    monkeypatch.setattr("pytorch_quant.demo.run_demo", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "pytorch-quant demo: this needs sklearn\n"
    with pytest.raises(ImportError):
        cli.main(["--debug", "demo"])

    def interrupt(folder, quick):
        raise KeyboardInterrupt

    monkeypatch.setattr("pytorch_quant.demo.run_demo", interrupt)
    assert cli.main(["demo"]) == 130
    with pytest.raises(SystemExit) as usage:
        cli.main(["demmo"])
    assert usage.value.code == 2


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == sys.modules["pytorch_quant"].__version__
