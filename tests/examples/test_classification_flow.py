"""The classification example on a tiny folder of generated images."""

from __future__ import annotations

import builtins
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from pytorch_quant.models import create_model

SCRIPT = Path(__file__).parents[2] / "examples" / "classification_flow.py"
CLASSES = ("dark", "light")


@pytest.fixture(scope="module")
def flow():
    spec = importlib.util.spec_from_file_location("classification_flow", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vision():
    """Skips where the example cannot run."""
    try:
        from torchvision import datasets  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported: {error}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with `train/` and `val/`, and float weights that tell its classes apart."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    images, labels = [], []
    for split, count in (("train", 16), ("val", 12)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 160, (36, 36, 3)) + 90 * label
                image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
                if split == "train":
                    images.append(pixels[2:34, 2:34] / 255)
                    labels.append(label)
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    x = (x - 0.45) / 0.225
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=2, small_input=True, width=8).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(12):
        loss = F.cross_entropy(model(x), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, root / "w.pth")
    return root


@pytest.fixture
def run(flow, data, tmp_path, capsys):
    """Runs the example with tiny settings; returns its output, or its error."""

    def run(*options, arch="resnet18", weights=data / "w.pth", data_dir=data):
        argv = f"--data-dir {data_dir} --arch {arch} --weights {weights} --image-size 32 "
        argv += f"--batch-size 8 --num-calib-batches 2 --workers 0 --device cpu --output {tmp_path}"
        try:
            code = flow.main([*argv.split(), *map(str, options)])
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def table(output):
    """`{name: (top1, loss)}` of the printed lines."""
    found = re.findall(r"^(FP32|int8 .*?) +(\d+\.\d\d) +(\d+\.\d{4})$", output, re.MULTILINE)
    return {name: (float(top1), float(loss)) for name, top1, loss in found}


def val_images(flow, data):
    """The validation images as the flow sees them, in one batch."""
    argv = f"--data-dir {data} --weights {data / 'w.pth'} --image-size 32 --device cpu".split()
    _, _, val, _ = flow.load_data(flow.parse([*argv, "--output", str(data / "out")]))
    return torch.stack([x for x, _ in val]), torch.tensor([y for _, y in val])


def quantized(checkpoint):
    model = create_model("resnet18", quantize=True, num_classes=2, small_input=True, width=8)
    model.load_state_dict(checkpoint["model"])
    return model.eval()


@pytest.mark.slow
def test_the_whole_flow(flow, run, data, tmp_path, monkeypatch, vision):
    collected, ranged = [], []
    calibrate, compute_amax = flow.calibrate, flow.compute_amax
    monkeypatch.setattr(
        flow, "calibrate", lambda *a, **k: collected.append(a[2]) or calibrate(*a, **k)
    )
    monkeypatch.setattr(
        flow, "compute_amax", lambda *a, **k: ranged.append((a[1], k)) or compute_amax(*a, **k)
    )
    path = tmp_path / "deeper" / "net.onnx"
    options = ("--percentile", 90, 99.9, "--finetune-epochs", 1, "--export", path)
    code, output, errors = run(*options)
    assert code == 0
    assert collected == ["percentile"]
    rows = table(output)
    methods = ["max", "percentile 90", "percentile 99.9", "mse", "entropy", "fine-tuned"]
    assert list(rows) == ["FP32", *(f"int8 {m}" for m in methods)]
    assert rows["FP32"][0] > 90
    assert ranged == [
        ("max", {}),
        ("percentile", {"percentile": 90}),
        ("percentile", {"percentile": 99.9}),
        ("mse", {}),
        ("entropy", {}),
    ]
    assert rows["FP32"][1] != rows["int8 max"][1] != rows["int8 percentile 90"][1]
    for bar in ("calibrate", "evaluate FP32", "fine-tune 1/1", "ONNX Runtime"):
        assert bar in errors

    checkpoint = torch.load(tmp_path / "calibrated.pth", weights_only=True)
    calibrated = {n: r for n, r in rows.items() if n not in ("FP32", "int8 fine-tuned")}
    best = max(calibrated, key=lambda n: (rows[n][0], -rows[n][1]))
    assert checkpoint["name"] == best and checkpoint["arch"] == "resnet18"
    x, labels = val_images(flow, data)
    with torch.inference_mode():
        logits = quantized(checkpoint)(x)
    assert 100 * (logits.argmax(1) == labels).float().mean().item() == pytest.approx(
        rows[best][0], abs=0.01
    )
    assert F.cross_entropy(logits, labels).item() == pytest.approx(rows[best][1], abs=1e-4)

    tuned = torch.load(tmp_path / "finetuned.pth", weights_only=True)
    assert not torch.equal(tuned["model"]["conv1.weight"], checkpoint["model"]["conv1.weight"])
    nodes = onnx.load(path).graph.node
    kinds = [node.op_type for node in nodes]
    # Weights are stored as integers: 20 convolutions and fc.
    assert kinds.count("DequantizeLinear") - kinds.count("QuantizeLinear") == 21
    producers = {output: node.op_type for node in nodes for output in node.output}
    adds = [sorted(producers[i] for i in n.input) for n in nodes if n.op_type == "Add"]
    assert adds == [["BatchNormalization", "DequantizeLinear"]] * 8
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (batch,) = session.run(None, {session.get_inputs()[0].name: x[:3].numpy()})
    with torch.inference_mode():
        expected = quantized(tuned if rows["int8 fine-tuned"][0] >= rows[best][0] else checkpoint)(
            x[:3]
        )
    np.testing.assert_allclose(batch, expected.numpy(), atol=0.05)
    equal, of = map(int, re.search(r"on (\d+) of (\d+) images", output).groups())
    assert of == 24 and equal >= 23


def test_maxima_only(run, tmp_path, vision):
    code, output, _ = run("--calibrator", "max")
    assert code == 0
    assert list(table(output)) == ["FP32", "int8 max"]
    assert [p.name for p in tmp_path.iterdir()] == ["calibrated.pth"]


def test_fine_tuning_that_loses_accuracy_is_not_kept(flow, run, tmp_path, monkeypatch, vision):
    def spoil(model, dataset, args):
        with torch.no_grad():
            model.fc.bias.copy_(torch.tensor([0.0, 1e4]))

    exported = []
    monkeypatch.setattr(flow, "finetune", spoil)
    monkeypatch.setattr(flow, "export", lambda model, *a: exported.append(model.fc.bias.clone()))
    code, output, _ = run(
        "--calibrator", "max", "--finetune-epochs", 1, "--export", tmp_path / "net.onnx"
    )
    assert code == 0
    assert table(output)["int8 fine-tuned"][0] == 50
    assert "fine-tuning lost accuracy; going on with int8 max" in output
    kept = torch.load(tmp_path / "calibrated.pth", weights_only=True)["model"]["fc.bias"]
    assert torch.equal(exported[0], kept)


def test_a_loss_that_is_not_finite_stops(flow, run, tmp_path, monkeypatch, vision):
    def diverged(model, *args):
        with torch.no_grad():
            model.fc.bias[0] = torch.inf
        finetune(model, *args)

    finetune = flow.finetune
    monkeypatch.setattr(flow, "finetune", diverged)
    code, output, errors = run("--calibrator", "max", "--finetune-epochs", 1)
    assert code == 2
    # At the start of a line, although a progress bar was there.
    assert re.search(r"\rerror: the loss became (nan|inf) .*; use a smaller --lr\n", errors)
    assert "saved" in output and (tmp_path / "calibrated.pth").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--lr", "nan"], "--lr must be at least 0, got nan"),
        (["--percentile", "99", "101"], r"--percentile must be above 0 and at most 100"),
        (["--calibrator", "min"], "argument --calibrator: invalid choice: 'min'"),
        (["--device", "warp"], "warp"),
        (["--arch", "vgg16"], "unknown --arch 'vgg16'; valid: resnet18, .*wide_resnet101_2"),
        (["--data-dir", "/nowhere"], "/nowhere/train does not exist"),
        (["--weights", "/nowhere/w.pth"], "/nowhere/w.pth does not exist"),
        (["--output", __file__], "File exists"),
    ],
)
def test_bad_arguments(run, options, message):
    assert_one_line(run(*options), message)


def assert_one_line(result, message):
    code, output, errors = result
    assert code == 2 and output == ""
    assert errors.count("\n") == 1 and errors.startswith("error: ")
    assert re.search(message, errors), errors


def weights_of(**options):
    return create_model("resnet18", small_input=True, width=8, **options).state_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: weights_of(num_classes=3), "--weights has 3 classes, --data-dir 2"),
        (lambda: {"state_dict": weights_of(num_classes=4)}, "has 4 classes, --data-dir 2"),
        (lambda: {"epoch": 3}, "holds no conv1.weight and fc.weight"),
        (lambda: torch.zeros(3), "holds no conv1.weight and fc.weight"),
        (
            lambda: create_model("resnet34", small_input=True, width=8, num_classes=2).state_dict(),
            "--weights does not fit --arch resnet18: .*[Uu]nexpected key",
        ),
        (lambda: create_model("resnet18", width=8), "is no checkpoint of tensors: Weights only"),
    ],
)
def test_weights_that_do_not_fit(run, tmp_path, vision, content, message):
    torch.save(content(), tmp_path / "other.pth")
    assert_one_line(run(weights=tmp_path / "other.pth"), message)


def test_a_damaged_checkpoint(run, tmp_path, vision):
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 and no more")
    assert_one_line(run(weights=tmp_path / "broken.pth"), "is no checkpoint of tensors: ")


def test_splits_with_other_classes(run, data, tmp_path, vision):
    for split, names in (("train", ("dark", "light")), ("val", ("dark", "dim"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(
                (data / "val" / "dark" / "0.png").read_bytes()
            )
    assert_one_line(run(data_dir=tmp_path), "train and val differ in the classes dim, light")


def test_an_empty_split(run, data, tmp_path, vision):
    for split in ("train", "val"):
        (tmp_path / split / "dark").mkdir(parents=True)
    assert_one_line(run(data_dir=tmp_path), "--data-dir: Found no valid file")


def test_an_export_without_onnxruntime_stops_before_all_else(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = run("--export", tmp_path / "m.onnx")
    assert_one_line(found, r"this needs onnxruntime.*pip install \"pytorch-quant\[onnxruntime\]")


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'torchvision'"),
        RuntimeError("operator torchvision::nms does not exist"),
    ],
)
def test_without_torchvision(run, monkeypatch, error):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "torchvision":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    sentence = 'This example needs torchvision: pip install "pytorch-quant[vision]"'
    assert_one_line(run(), re.escape(f"{sentence} ({error})"))
