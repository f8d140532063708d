"""The whole way: train, quantize, calibrate, compare, fine-tune, export, run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pytorch_quant import quant_modules
from pytorch_quant.demo import pictures
from pytorch_quant.demo.digits import Split, load_digits
from pytorch_quant.demo.runtime import latencies, open_session, predict_onnx
from pytorch_quant.demo.training import predict, top1, train
from pytorch_quant.export import export_onnx
from pytorch_quant.files import written_aside
from pytorch_quant.models import ResNet, resnet18
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.optional import require
from pytorch_quant.ptq import calibrate, compute_amax

METHODS: list[tuple[str, str, dict[str, Any]]] = [
    ("max", "max", {}),
    ("percentile 99.9", "percentile", {"percentile": 99.9}),
    ("percentile 99.99", "percentile", {"percentile": 99.99}),
    ("MSE", "mse", {}),
    ("entropy", "entropy", {}),
]
# Chosen beforehand, not by the test split that the table reports.
TO_FINE_TUNE = METHODS[3]
TO_DEPLOY = METHODS[2]
CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured.

    Attributes:
        accuracy: Top-1 in percent by row of the table.
        onnx_top1: Top-1 of the int8 file in ONNX Runtime, percent.
        agreement: Share of equal predictions of the file and the fake-quantized model, percent.
        agreement_unoptimized: The same with ONNX Runtime's optimizations off.
        sizes: Bytes of the float and of the int8 file.
        latency: Milliseconds per image of the float and of the int8 file.
        folder: Where the files are.
    """

    accuracy: dict[str, float]
    onnx_top1: float
    agreement: float
    agreement_unoptimized: float
    sizes: tuple[int, int]
    latency: tuple[float, float]
    folder: Path

    def __str__(self) -> str:
        lines = ["", f"{'model':<34}{'top-1 %':>9}", "-" * 43]
        lines += [f"{row:<34}{value:>9.2f}" for row, value in self.accuracy.items()]
        lines += [
            "-" * 43,
            f"{'int8 file in ONNX Runtime':<34}{self.onnx_top1:>9.2f}",
            "",
            f"{'same prediction as simulated':<34}{self.agreement:>8.2f}%",
            f"{'  with optimizations off':<34}{self.agreement_unoptimized:>8.2f}%",
            "",
            f"{'':<20}{'float':>10}{'int8':>10}",
            f"{'file, KB':<20}" + "".join(f"{size / 1e3:>10.0f}" for size in self.sizes),
            f"{'latency, ms':<20}" + "".join(f"{value:>10.2f}" for value in self.latency),
            "",
            f"Files: {self.folder}/",
        ]
        return "\n".join(lines)


def build(quantize: bool = False) -> ResNet:
    """The small residual network."""
    return resnet18(quantize=quantize, num_classes=10, in_channels=1, width=16, small_input=True)


def run_demo(folder: str | Path = "runs/demo", *, quick: bool = False) -> DemoResult:
    """Run the demonstration and write its files.

    Args:
        folder: Where the ONNX files, the checkpoint and the pictures go.
        quick: Train less; the numbers are lower.

    Raises:
        ImportError: scikit-learn, matplotlib or ONNX Runtime is not installed.
    """
    # Before the training, as they come last.
    require("onnxruntime")
    require("matplotlib")
    torch.manual_seed(0)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train_data, test_data = load_digits()

    model = build()
    train(model, train_data, 3 if quick else 12, 4e-3, "train float")
    accuracy = {"float32": top1(predict(model, test_data, "float32"), test_data)}

    batches = [train_data[i] for i in range(CALIBRATION_BATCHES)]
    int8 = _quantized(model, 8)
    _compare_methods(int8, batches, test_data, "int8", accuracy)
    int4 = _quantized(model, 4)
    amax = _compare_methods(int4, batches, test_data, "4-bit", accuracy)
    pictures.histograms(int4, amax, folder / "histograms.png")

    compute_amax(int4, TO_FINE_TUNE[1], **TO_FINE_TUNE[2])
    train(int4, train_data, 2 if quick else 8, 1e-3, "fine-tune 4-bit")
    accuracy["4-bit after fine-tuning"] = top1(predict(int4, test_data, "4-bit"), test_data)
    pictures.accuracies(accuracy, folder / "accuracy.png")

    compute_amax(int8, TO_DEPLOY[1], **TO_DEPLOY[2])
    with written_aside(folder / "int8.pt") as aside:
        torch.save(int8.state_dict(), aside)
    return _deploy(model, int8, test_data, accuracy, folder)


def _quantized(model: nn.Module, bits: int) -> nn.Module:
    with quant_modules.initialize():
        quantized = build(quantize=True)
    quantized.load_state_dict(model.state_dict())
    for quantizer in named_quantizers(quantized).values():
        quantizer.num_bits = bits
    return quantized


def _compare_methods(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    data: Split,
    bits: str,
    accuracy: dict[str, float],
) -> dict[str, dict[str, float]]:
    """Fill in one row of accuracy per method; returns each activation quantizer's amax."""
    calibrate(model, batches, method="entropy")
    amax: dict[str, dict[str, float]] = {}
    for label, method, options in METHODS:
        report = compute_amax(model, method, **options)
        row = f"{bits}, {label}"
        accuracy[row] = top1(predict(model, data, row), data)
        amax[label] = {r.name: float(r.amax) for r in report.ranges if r.amax.numel() == 1}  # type: ignore[union-attr, arg-type]
    return amax


def _deploy(
    model: nn.Module, int8: nn.Module, data: Split, accuracy: dict[str, float], folder: Path
) -> DemoResult:
    simulated = predict(int8, data, "int8")
    example = data.images[:2]
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    int8_file, float_file = folder / "int8.onnx", folder / "float32.onnx"
    for network, file in tqdm(((int8, int8_file), (model, float_file)), desc="export"):
        tqdm.write(str(export_onnx(network, example, file, dynamic_shapes=shapes)))
    session, unoptimized = open_session(int8_file), open_session(int8_file, optimize=False)
    in_onnx = predict_onnx(session, data, "ONNX Runtime")
    in_onnx_unoptimized = predict_onnx(unoptimized, data, "ONNX Runtime, unoptimized")
    float_ms, int8_ms = latencies([open_session(float_file), session], data.images[:1])
    return DemoResult(
        accuracy=accuracy,
        onnx_top1=top1(in_onnx, data),
        agreement=_share_equal(in_onnx, simulated),
        agreement_unoptimized=_share_equal(in_onnx_unoptimized, simulated),
        sizes=(float_file.stat().st_size, int8_file.stat().st_size),
        latency=(float_ms, int8_ms),
        folder=folder,
    )


def _share_equal(a: Tensor, b: Tensor) -> float:
    return 100.0 * (a == b).float().mean().item()
