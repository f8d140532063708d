"""Quantize an image classifier: calibrate, compare methods, fine-tune, export, run.

Needs torchvision, a folder with `train/` and `val/`, one subfolder a class in each, and a
checkpoint of a float ResNet with as many classes (torchvision's, or one with its parameter names).

Compare all calibration methods on histograms that are collected once:

    python examples/classification_flow.py --data-dir imagenet --arch resnet50 \
        --weights resnet50.pth

The quickest way, maxima only:

    python examples/classification_flow.py --data-dir imagenet --arch resnet50 \
        --weights resnet50.pth --calibrator max --num-calib-batches 4

Several percentiles, then fine-tuning of the best method, then a Q/DQ ONNX file:

    python examples/classification_flow.py --data-dir imagenet --arch resnet50 \
        --weights resnet50.pth --percentile 99.9 99.99 99.999 \
        --finetune-epochs 1 --lr 1e-4 --export resnet50_int8.onnx --output runs/resnet50

Checkpoints are written to `--output`. For a model of your own, build it inside
`with quant_modules.initialize():` instead of `create_model(..., quantize=True)`.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from pytorch_quant import calibrate, compute_amax, export_onnx
from pytorch_quant.models import ARCHITECTURES, create_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHECKED_BATCHES = 4


class Row(NamedTuple):
    """One line of the table; top-1 in percent, the loss is the mean cross entropy."""

    name: str
    top1: float
    loss: float


def fail(message: object) -> NoReturn:
    """Print one line and exit with code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line, as far as that needs no data."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), help="data loading processes")
    add("--device", default=default_device)
    add("--finetune-epochs", type=int, default=0, help="quantization-aware training")
    add("--lr", type=float, default=1e-4, help="about a hundredth of the training's")
    add("--export", type=Path, metavar="PATH", help="write a Q/DQ ONNX file")
    add("--output", type=Path, default=Path("runs/classification"), metavar="DIR")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    for name in ("num_calib_batches", "batch_size", "image_size"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.workers < 0 or args.finetune_epochs < 0 or not 0 < args.lr < float("inf"):
        fail("--workers and --finetune-epochs must be at least 0, and --lr a number above 0")
    for percentile in args.percentile:
        if not 0 < percentile <= 100:
            fail(f"--percentile must be above 0 and at most 100, got {percentile:g}")
    if args.arch not in ARCHITECTURES:
        fail(f"unknown --arch {args.arch!r}; valid: {', '.join(ARCHITECTURES)}")
    for split in ("train", "val"):
        if not (args.data_dir / split).is_dir():
            fail(f"--data-dir: {args.data_dir / split} is no folder")
    if not args.weights.is_file():
        fail(f"--weights: {args.weights} is no file")
    try:
        args.device = torch.zeros(1, device=args.device).device
        args.output.mkdir(parents=True, exist_ok=True)
        if args.export:
            args.export.parent.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        fail(error)
    return args


def load_data(args: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset, int]:
    """The training images with and without augmentation, the validation images, the classes."""
    try:
        from torchvision import datasets, transforms
    except Exception as error:  # built for another torch, it fails with errors of its own
        print(
            'This example needs torchvision: pip install "pytorch-quant[vision]" '
            f"({type(error).__name__}: {str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    size = args.image_size
    as_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    plain = transforms.Compose(
        [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), *as_tensor]
    )
    augmented = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *as_tensor]
    )
    try:
        train = datasets.ImageFolder(str(args.data_dir / "train"), augmented)
        calib = datasets.ImageFolder(str(args.data_dir / "train"), plain)
        val = datasets.ImageFolder(str(args.data_dir / "val"), plain)
    except FileNotFoundError as error:
        fail(f"--data-dir: {error}")
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        fail(f"--data-dir: train and val differ in the classes {', '.join(differing)}")
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
    models = []
    for quantize in (False, True):
        model = create_model(args.arch, quantize=quantize, **options)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            fail(f"--weights does not fit --arch {args.arch}: {str(error)[:300]}")
        models.append(model.to(args.device))
    return models[0], models[1]


def batches_of(dataset: Any, args: argparse.Namespace, count: int | None = None) -> DataLoader:
    """Batches in order, or `count` batches of images drawn at random."""
    if count is not None:
        generator = torch.Generator().manual_seed(args.seed)
        chosen = torch.randperm(len(dataset), generator=generator)[: count * args.batch_size]
        dataset = Subset(dataset, chosen.tolist())
    pinned = args.device.type == "cuda"
    return DataLoader(dataset, args.batch_size, num_workers=args.workers, pin_memory=pinned)


@torch.inference_mode()
def evaluate(name: str, model: nn.Module, loader: Iterable, device: torch.device) -> Row:
    """Top-1 and loss, printed as a line of the table."""
    model.eval()
    correct, loss, seen = 0, 0.0, 0
    for images, labels in tqdm(loader, desc=f"evaluate {name}", leave=False):
        logits, labels = model(images.to(device)), labels.to(device)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        seen += len(labels)
    row = Row(name, 100 * correct / seen, loss / seen)
    tqdm.write(f"{row.name:<20}{row.top1:>8.2f}{row.loss:>10.4f}")
    return row


def finetune(model: nn.Module, dataset: Any, args: argparse.Namespace) -> None:
    """Quantization-aware training with fixed ranges and a small learning rate."""
    drop_last = len(dataset) > args.batch_size  # batch norm cannot train on a single image
    loader = DataLoader(
        dataset, args.batch_size, shuffle=True, drop_last=drop_last, num_workers=args.workers
    )
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    steps = args.finetune_epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
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
    """Write a checkpoint aside and rename it, so that no failure leaves half a file."""
    aside = path.with_name(f".{path.name}.part")
    content = {"model": model.state_dict(), "arch": args.arch, **row._asdict()}
    torch.save(content, aside)
    os.replace(aside, path)
    print(f"saved {path}: {row.name}, top-1 {row.top1:.2f} %")


def export(model: nn.Module, loader: Iterable, args: argparse.Namespace) -> None:
    """Write the ONNX file and compare ONNX Runtime with the model on a few batches."""
    import onnxruntime

    model = model.cpu().eval()
    example = torch.zeros(2, 3, args.image_size, args.image_size)
    print(export_onnx(model, (example,), args.export, dynamic_shapes=({0: "batch"},)))
    session = onnxruntime.InferenceSession(str(args.export), providers=["CPUExecutionProvider"])
    (graph_input,) = session.get_inputs()
    equal, correct, seen = 0, 0, 0
    for images, labels in tqdm(loader, desc="ONNX Runtime", leave=False):
        with torch.inference_mode():
            expected = model(images).argmax(1).numpy()
        (logits,) = session.run(None, {graph_input.name: images.numpy()})
        predicted = np.argmax(logits, axis=1)
        equal += int((predicted == expected).sum())
        correct += int((predicted == labels.numpy()).sum())
        seen += len(labels)
    print(
        f"ONNX Runtime on {seen} images: top-1 {100 * correct / seen:.2f} %, "
        f"{100 * equal / seen:.2f} % predicted as by the fake-quantized model"
    )


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
    _, collected, options = methods[-1 if args.calibrator == "max" else 1]
    calib_loader = batches_of(calib, args, args.num_calib_batches)
    calibrate(
        model,
        calib_loader,
        collected,
        forward=lambda model, batch: model(batch[0].to(args.device)),
        **options,
    )

    print(f"{args.arch}, {len(val)} validation images\n{'':<20}{'top-1 %':>8}{'loss':>10}")
    evaluate("FP32", float_model, val_loader, args.device)
    del float_model
    best, best_state = None, {}
    for name, method, options in methods:
        compute_amax(model, method, **options)
        row = evaluate(f"int8 {name}", model, val_loader, args.device)
        if best is None or (row.top1, -row.loss) > (best.top1, -best.loss):
            best, best_state = row, copy.deepcopy(model.state_dict())
    assert best is not None
    model.load_state_dict(best_state)
    save(args.output / "calibrated.pth", model, best, args)

    if args.finetune_epochs:
        finetune(model, train, args)
        row = evaluate("int8 fine-tuned", model, val_loader, args.device)
        save(args.output / "finetuned.pth", model, row, args)
        if row.top1 < best.top1:
            print(f"fine-tuning lost accuracy; going on with {best.name}")
            model.load_state_dict(best_state)
    if args.export:
        export(model, batches_of(val, args, CHECKED_BATCHES), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
