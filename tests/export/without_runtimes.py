"""What works without ONNX Runtime and OpenVINO, and what the rest says, as JSON on the last line.

python tests/export/without_runtimes.py FOLDER
"""

# ruff: noqa: E402  the packages are hidden before anything asks for them
import contextlib
import io
import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path


class WithoutRuntimes(PathFinder):
    """Finds neither of them, as where they are not installed.

    It does not raise, as torch asks `importlib.util.find_spec` for onnxruntime.
    """

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname in ("onnxruntime", "openvino"):
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutRuntimes

import torch
from torch import nn

import pytorch_quant as pq
from pytorch_quant import cli
from pytorch_quant.demo import run_demo
from pytorch_quant.html_report import report


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16),
    ).eval()  # fmt: skip


def trained(x, placement):
    """Quantized, calibrated, and one step of training further."""
    model = pq.quantize(network(), example_inputs=x, placement=placement)
    pq.fold_batchnorm(model)
    pq.calibrate(model, [x], method="percentile", progress=False)
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nn.functional.cross_entropy(model.train()(x), torch.arange(4)).backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    return model.eval()


def error(function, *args, **kwargs):
    """What the ImportError says."""
    try:
        function(*args, **kwargs)
    except ImportError as raised:
        return str(raised)
    raise AssertionError(f"{function.__name__} raised nothing")


def command(*words):
    """The code and what a command writes to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as written:
        code = cli.main([str(word) for word in words])
    assert code == 1, written.getvalue()
    return written.getvalue()


def main(folder):
    x = torch.randn(4, 3, 8, 8)
    seen, models = {}, {}
    for target in ("tensorrt", "onnxruntime"):
        model = models[target] = trained(x, target)
        file = folder / f"{target}.onnx"
        exported = pq.export_onnx(model, x, file, target=target)
        seen[f"quantized layers for {target}"] = exported.quantized_layers
        seen[f"errors for {target}"] = [
            str(f) for f in pq.lint_onnx(file, target) if f.severity == "error"
        ]
        seen[f"int8 for {target}"] = pq.predict_int8(file, target).share
    fixed = pq.fix_onnx(folder / "tensorrt.onnx", folder / "fixed.onnx", target="onnxruntime")
    seen["repairs"] = sum(fixed.repairs.values())

    model, file = models["tensorrt"], folder / "tensorrt.onnx"
    verified = pq.verify_onnx(file, model, x, progress=False)
    seen["verified"] = verified.ok, verified.quantizers, {row.engine for row in verified.rows}
    seen["not run"] = verified.not_run
    words = {"rounds": 1, "warmup": 0, "progress": False}
    seen["verify of a large graph"] = error(pq.verify_onnx, file, model, x, reference=False)
    seen["verify there"] = error(pq.verify_onnx, file, model, x, engines=["onnxruntime"])
    seen["verify in OpenVINO"] = error(pq.verify_onnx, file, model, x, engines=["openvino"])
    for engine in ("auto", "onnxruntime", "openvino"):
        # No input at all: the engine is asked for before the export.
        seen[f"convert, {engine}"] = error(pq.convert, model, None, engine)
        seen[f"load, {engine}"] = error(pq.load, file, engine)
    seen["load"] = error(pq.load, file)
    seen["latency"] = error(pq.compare_latency, [file], **words)
    seen["demo"] = error(run_demo, folder / "demo")
    page = report(model, [x], folder / "page.html", latency=True, progress=False)
    seen["page"] = page.export_error
    seen["bench"] = command("bench", file, "-q")
    # Neither is read before that.
    seen["quantize --verify"] = command("quantize", "none.py:f", "--data", "none", "--verify")
    assert not {"onnxruntime", "openvino"} & set(sys.modules)
    print(json.dumps(seen, default=sorted))


main(Path(sys.argv[1]))
