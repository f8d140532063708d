r"""Quantize an image classifier: calibrate, compare methods, fine-tune, export, run.

Needs torchvision, for --export ONNX Runtime, a folder with `train/` and `val/`, one subfolder a
class in each, and a float checkpoint of a ResNet with as many classes and torchvision's parameter
names:

    python examples/classification_flow.py --data-dir imagenet --arch resnet50 --weights r50.pth

compares all methods on one set of histograms. Maxima only, and on to a fine-tuned ONNX file:

    python examples/classification_flow.py ... --calibrator max --num-calib-batches 4
    python examples/classification_flow.py ... --percentile 99.9 99.99 99.999 \
        --finetune-epochs 1 --lr 1e-4 --export r50_int8.onnx --output runs/r50

For a model of your own, build it inside `with quant_modules.initialize():`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from pytorch_quant import calibrate, compute_amax, export_onnx
from pytorch_quant.files import written_aside
from pytorch_quant.models import ARCHITECTURES, create_model
from pytorch_quant.optional import require


class Row(NamedTuple):
    """One line of the table: top-1 in percent, mean cross entropy."""

    name: str
    top1: float
    loss: float


def fail(message: object) -> NoReturn:
    """Print one line and exit with code 2."""
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line, as far as that needs no data."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = fail  # type: ignore[method-assign]
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="folder with train/ and val/")
    add("--arch", default="resnet50", help=", ".join(ARCHITECTURES))
    add("--weights", type=Path, required=True, help="float checkpoint, a state_dict or holding one")
    add("--calibrator", choices=("max", "histogram"), default="histogram")
    add("--percentile", type=float, nargs="+", default=[99.9, 99.99], help="0 to 100")
    add("--num-calib-batches", type=int, default=16, help="taken from train/")
    add("--batch-size", type=int, default=64)
    add("--image-size", type=int, default=224)
    add("--workers", type=int, default=2, help="data loading processes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--finetune-epochs", type=int, default=0, help="quantization-aware training")
    add("--lr", type=float, default=1e-4, help="about a hundredth of the training's")
    add("--export", type=Path, metavar="PATH", help="write a Q/DQ ONNX file")
    add("--output", type=Path, default=Path("runs/classification"), metavar="DIR")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    lowest = {"num_calib_batches": 1, "batch_size": 1, "image_size": 1}
    for name, low in {**lowest, "workers": 0, "finetune_epochs": 0, "lr": 0}.items():
        if not low <= getattr(args, name) < float("inf"):
            fail(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if not all(0 < p <= 100 for p in args.percentile):
        fail(f"--percentile must be above 0 and at most 100, got {args.percentile}")
    if args.arch not in ARCHITECTURES:
        fail(f"unknown --arch {args.arch!r}; valid: {', '.join(ARCHITECTURES)}")
    for path in (args.data_dir / "train", args.data_dir / "val", args.weights):
        if not path.exists():
            fail(f"{path} does not exist")
    try:
        args.device = torch.zeros(1, device=args.device).device
        for folder in (args.output, *([args.export.parent] if args.export else [])):
            folder.mkdir(parents=True, exist_ok=True)
        if args.export:
            # Now, and not after the training: the file is run at the end.
            require("onnxruntime")
    except (ImportError, RuntimeError, AssertionError, OSError) as error:
        fail(error)
    return args


def load_data(args: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset, int]:
    """The training images with and without augmentation, the validation images, the classes."""
    try:
        from torchvision import datasets, transforms
    except Exception as error:  # built for another torch, it fails with errors of its own
        fail(f'This example needs torchvision: pip install "pytorch-quant[vision]" ({error})')
    size = args.image_size
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crop = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    random_crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    tail = [transforms.ToTensor(), normalize]
    plain, augmented = (transforms.Compose([*head, *tail]) for head in (crop, random_crop))
    folders = (("train", augmented), ("train", plain), ("val", plain))
    try:
        train, calib, val = (datasets.ImageFolder(str(args.data_dir / n), t) for n, t in folders)
    except FileNotFoundError as error:
        fail(f"--data-dir: {error}")
    if differing := set(train.classes) ^ set(val.classes):
        fail(f"--data-dir: train and val differ in the classes {', '.join(sorted(differing))}")
    return train, calib, val, len(val.classes)


def load_weights(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """The float and the quantized model with the weights of the checkpoint."""
    try:
        state = torch.load(args.weights, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of a damaged file raises whatever it stumbles over
        fail(f"--weights: {args.weights} is no checkpoint of tensors: {str(error).split('. ')[0]}")
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    # DistributedDataParallel and DataParallel put this in front of every name.
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    stem, head = state.get("conv1.weight"), state.get("fc.weight")
    if not isinstance(stem, Tensor) or not isinstance(head, Tensor):
        fail(f"--weights: {args.weights} holds no conv1.weight and fc.weight, so no ResNet")
    if len(head) != num_classes:
        fail(f"--weights has {len(head)} classes, --data-dir {num_classes}")
    options = {"small_input": stem.shape[-1] == 3, "width": len(stem), "num_classes": num_classes}
    models = [create_model(args.arch, quantize=quantize, **options) for quantize in (False, True)]
    try:
        for model in models:
            model.load_state_dict(state)
    except RuntimeError as error:
        fail(f"--weights does not fit --arch {args.arch}: {str(error)[:300]}")
    return models[0].to(args.device), models[1].to(args.device)


def batches_of(dataset: Any, args: argparse.Namespace, **options: Any) -> DataLoader:
    """Batches on the CPU; of `count` of them the images are random, the same in every run."""
    if count := options.pop("count", None):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))
        dataset = Subset(dataset, order[: count * args.batch_size].tolist())
    return DataLoader(dataset, args.batch_size, num_workers=args.workers, **options)


@torch.inference_mode()
def evaluate(name: str, model: nn.Module, loader: Iterable, args: argparse.Namespace) -> Row:
    """Top-1 and loss, printed as a line of the table."""
    model.eval()
    correct, loss, seen = 0, 0.0, 0
    for images, targets in tqdm(loader, desc=f"evaluate {name}", leave=False):
        logits, labels = model(images.to(args.device)), targets.to(args.device)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        seen += len(labels)
    row = Row(name, 100 * correct / seen, loss / seen)
    tqdm.write(f"{row.name:<28}{row.top1:>8.2f}{row.loss:>10.4f}")
    return row


def finetune(model: nn.Module, dataset: Any, args: argparse.Namespace) -> None:
    """Quantization-aware training with fixed ranges and a small learning rate."""
    loader = batches_of(dataset, args, shuffle=True, drop_last=len(dataset) > args.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    schedule = CosineAnnealingLR(optimizer, args.finetune_epochs * len(loader))
    model.train()
    for epoch in range(args.finetune_epochs):
        bar = tqdm(loader, desc=f"fine-tune {epoch + 1}/{args.finetune_epochs}", leave=False)
        for images, labels in bar:
            loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
            if not torch.isfinite(loss):
                fail(f"the loss became {loss.item()} in fine-tuning; use a smaller --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}")


def save(path: Path, model: nn.Module, row: Row, args: argparse.Namespace) -> None:
    """Write a checkpoint, aside first, so that no failure leaves half a file."""
    with written_aside(path) as aside:
        torch.save({"model": model.state_dict(), "arch": args.arch, **row._asdict()}, aside)
    print(f"saved {path}: {row.name}, top-1 {row.top1:.2f} %")


def export(model: nn.Module, loader: Iterable, args: argparse.Namespace) -> None:
    """Write the ONNX file and compare ONNX Runtime with the model on a few batches."""
    model.cpu().eval()
    example = (torch.zeros(2, 3, args.image_size, args.image_size),)
    print(export_onnx(model, example, args.export, dynamic_shapes=({0: "batch"},)))
    runtime = require("onnxruntime")
    session = runtime.InferenceSession(str(args.export), providers=["CPUExecutionProvider"])
    (graph_input,) = session.get_inputs()
    equal = seen = 0
    for images, _ in tqdm(loader, desc="ONNX Runtime", leave=False):
        with torch.inference_mode():
            expected = model(images).argmax(1).numpy()
        (logits,) = session.run(None, {graph_input.name: images.numpy()})
        equal += int((logits.argmax(1) == expected).sum())
        seen += len(images)
    print(f"ONNX Runtime predicts as the fake-quantized model on {equal} of {seen} images")


def main(argv: list[str] | None = None) -> int:
    """Run the flow; returns the exit code."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    train, calib, val, num_classes = load_data(args)
    float_model, model = load_weights(args, num_classes)
    val_loader = batches_of(val, args)

    methods: list[tuple[str, str, dict[str, float]]] = [("max", "max", {})]
    if args.calibrator == "histogram":
        methods += [(f"percentile {p:g}", "percentile", {"percentile": p}) for p in args.percentile]
        methods += [("mse", "mse", {}), ("entropy", "entropy", {})]
    # Any method but "max" makes calibrate keep histograms, which serve all of them.
    _, collected, options = methods[0 if args.calibrator == "max" else 1]
    loader = batches_of(calib, args, count=args.num_calib_batches)
    calibrate(model, loader, collected, forward=lambda m, b: m(b[0].to(args.device)), **options)
    print(f"{f'{args.arch}, {len(val)} images':<28}{'top-1 %':>8}{'loss':>10}")
    evaluate("FP32", float_model, val_loader, args)
    best, best_state = Row("", -1.0, 0.0), {}
    for name, method, options in methods:
        compute_amax(model, method, **options)
        row = evaluate(f"int8 {name}", model, val_loader, args)
        if (row.top1, -row.loss) > (best.top1, -best.loss):
            best, best_state = row, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    save(args.output / "calibrated.pth", model, best, args)

    if args.finetune_epochs:
        finetune(model, train, args)
        row = evaluate("int8 fine-tuned", model, val_loader, args)
        save(args.output / "finetuned.pth", model, row, args)
        if row.top1 < best.top1:
            print(f"fine-tuning lost accuracy; going on with {best.name}")
            model.load_state_dict(best_state)
    if args.export:
        export(model, batches_of(val, args, count=4), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
