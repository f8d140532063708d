"""Post-training quantization of a ResNet: calibrate once, compare methods, save, export, run.

    python examples/ptq_resnet.py                     # a small ResNet on handwritten digits
    python examples/ptq_resnet.py --smoke             # seconds, lower numbers
    python examples/ptq_resnet.py --build initialize  # quantized layers when the model is built
    python examples/ptq_resnet.py --data-dir imagenet --output runs/resnet50

The last one takes ResNet-50 with torchvision's weights, or those of --weights, and a folder with
train/ and val/, one subfolder a class in each. By default `quantize` puts quantizers into the float
model; with --build initialize they are there from the beginning, as in the tutorials of
pytorch_quantization. Either way the identity branch of each residual block has one.
"""

from __future__ import annotations

import argparse
import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import pytorch_quant as pq
from pytorch_quant.demo.digits import load_digits
from pytorch_quant.demo.training import train
from pytorch_quant.models import ResNet, resnet50
from pytorch_quant.models.blocks import Bottleneck

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "max": ("max", {}),
    "percentile 99.9": ("percentile", {"percentile": 99.9}),
    "percentile 99.99": ("percentile", {"percentile": 99.99}),
    "MSE": ("mse", {}),
    "entropy": ("entropy", {}),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with train/ and val/; else digits")
    parser.add_argument(
        "--weights", type=Path, help="state_dict of a ResNet-50; else torchvision's"
    )
    parser.add_argument("--build", choices=("quantize", "initialize"), default="quantize")
    parser.add_argument("--target", choices=("tensorrt", "onnxruntime"), default="tensorrt")
    parser.add_argument("--batches", type=int, default=8, help="for calibration")
    parser.add_argument("--output", type=Path, default=Path("runs/ptq_resnet"), metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="train less")
    return parser.parse_args(argv)


def build(args: argparse.Namespace, **options: Any) -> nn.Module:
    """The network without its weights."""
    if args.data_dir:
        return resnet50(**options)
    return ResNet(Bottleneck, (1, 1, 1, 1), 10, in_channels=1, width=32, **options)


def load(args: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """The float model, batches to calibrate on, and batches to evaluate on."""
    model = build(args)
    if not args.data_dir:
        train_data, test_data = load_digits()
        train(model, train_data, 2 if args.smoke else 12, 4e-3, "train float")
        return model.eval(), [train_data[i] for i in range(args.batches)], test_data
    from torchvision import datasets, models

    weights = models.ResNet50_Weights.DEFAULT
    state = torch.load(args.weights) if args.weights else weights.get_state_dict(progress=True)
    model.load_state_dict(state)
    loaders = {}
    for part in ("train", "val"):
        images = datasets.ImageFolder(args.data_dir / part, weights.transforms())
        loaders[part] = DataLoader(images, 64, shuffle=part == "train", num_workers=2)
    return model.eval(), list(islice(loaders["train"], args.batches)), loaders["val"]


def quantized(args: argparse.Namespace, model: nn.Module, images: torch.Tensor) -> nn.Module:
    """A quantized model with the weights of the float one."""
    if args.build == "quantize":
        return pq.quantize(copy.deepcopy(model), example_inputs=images, placement=args.target)
    # Every nn.Conv2d and nn.Linear that is made in here is quantized; `quantize=True` adds what
    # the patch cannot know of, the quantizers of the residual branches.
    with pq.quant_modules.initialize():
        other = build(args, quantize=True)
    other.load_state_dict(model.state_dict())
    return other.eval()


@torch.inference_mode()
def top1(model: nn.Module, data: Any, description: str) -> float:
    """The share of right predictions, in percent."""
    bar = tqdm(data, desc=description, leave=False)
    right = torch.cat([model(images).argmax(1) == labels for images, labels in bar])
    return 100 * float(right.float().mean())


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    float_model, batches, data = load(args)
    images = batches[0][0]
    table = {"float32": top1(float_model, data, "float32")}

    # One pass of the data fills histograms, from which every method takes its ranges.
    model = quantized(args, float_model, images)
    pq.calibrate(model, batches, "entropy")
    best = "max"
    for label, (method, options) in METHODS.items():
        pq.compute_amax(model, method, **options)
        table[label] = top1(model, data, label)
        if table[label] > table[best] or label == "max":
            best = label
            torch.save(model.state_dict(), args.output / "int8.pt")

    # A checkpoint holds the ranges as well: no data is needed to go on from it.
    reloaded = quantized(args, float_model, images)
    reloaded.load_state_dict(torch.load(args.output / "int8.pt"))
    table[f"{best}, reloaded"] = top1(reloaded, data, "reloaded")

    # Runtimes fold batch norm into the convolution in front of it; now the file says so as well.
    pq.fold_batchnorm(reloaded, images)
    varying = ({0: torch.export.Dim.DYNAMIC},)
    file = args.output / "int8.onnx"
    print(pq.export_onnx(reloaded, images[:2], file, target=args.target, dynamic_shapes=varying))
    pq.export_onnx(float_model, images[:2], args.output / "float32.onnx", dynamic_shapes=varying)
    table["int8.onnx in ONNX Runtime"] = top1(pq.load(file, "onnxruntime"), data, "ONNX Runtime")
    problems = pq.lint_onnx(file, target=args.target)

    print(f"\n{'model':<28}{'top-1 %':>9}\n{'-' * 37}")
    print("\n".join(f"{row:<28}{value:>9.2f}" for row, value in table.items()))
    sizes = [(args.output / f"{name}.onnx").stat().st_size / 1e3 for name in ("float32", "int8")]
    print(f"\nfile, KB: float32 {sizes[0]:.0f}, int8 {sizes[1]:.0f}")
    found = pq.summary(model)
    residual = {row.layer for row in found.rows if row.kind == "add" or "residual" in row.layer}
    print(f"quantizers: {found.quantizers}; residual additions with quantizers: {len(residual)}")
    print(f"lint for {args.target}: {len(problems)} finding(s)", *problems, sep="\n  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
