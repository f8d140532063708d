"""What `qat_accuracy.py` measures: training, PTQ and QAT on one fold of the digits."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from qat_accuracy_models import NETWORKS, rescaled
from torch import Tensor, nn
from torch.nn import functional as F

from pytorch_quant import QuantDescriptor, Scheme, calibrate, fold_batchnorm, qat, quantize
from pytorch_quant.demo.digits import load_digits

BATCH = 64
CALIBRATION_IMAGES = 512
FLOAT, QAT = "FP32", "QAT"
TENSOR = "per-tensor, max"
CHANNEL = "per-channel, MSE"
# Ranges of activations and of weights; chosen before any result.
PTQ = {TENSOR: "max", CHANNEL: "mse"}
PLAIN, RESCALED = "", " rescaled"


@dataclass(frozen=True)
class Settings:
    """One size of the experiment.

    Attributes:
        seeds: Numbered from 1; a seed decides the folds, the weights at first and the batches.
        folds: Parts of the images, each the test set of a network trained on the others.
        epochs: Of the float training.
        qat_epochs: Of quantization-aware training, for each bit width.
        images: How many of the images there are; None for all 1,797.
    """

    seeds: int = 3
    folds: int = 5
    epochs: int = 30
    qat_epochs: int = 25
    images: int | None = None

    @property
    def numbers(self) -> range:
        """The seeds themselves. Networks and recipe were developed on folds of 0 and of 100."""
        return range(1, self.seeds + 1)


def row(bits: int, method: str, network: str = PLAIN) -> str:
    """The name of one result, such as `8 QAT`."""
    return f"{bits} {method}{network}"


def measure(network: str, seed: int, fold: int, settings: Settings) -> dict[str, Any]:
    """Train and quantize one network on one fold.

    Returns:
        `wrong`: the images of the test part that each row gets wrong; `seconds` that it took.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    images, labels, test = fold_of(seed, fold, settings)
    train = torch.ones(len(labels), dtype=torch.bool)
    train[test] = False
    # The test part takes no part in the choice of scale and shift.
    images = (images - images[train].mean()) / images[train].std()
    data = images[train], labels[train]
    wrong: dict[str, list[int]] = {}

    def record(name: str, model: nn.Module) -> None:
        with torch.inference_mode():
            missed = model.eval()(images[test]).argmax(1) != labels[test]
        wrong[name] = sorted(test[missed].tolist())

    torch.manual_seed(100 * seed + fold)
    float_model = train_float(NETWORKS[network](), *data, settings.epochs)
    record(FLOAT, float_model)
    folded = copy.deepcopy(float_model)
    fold_batchnorm(folded, data[0][:2])
    for bits in (8, 4):
        for method in PTQ:
            record(row(bits, method), post_training(folded, bits, method, data[0]))
    hard = rescaled(folded)
    record(FLOAT + RESCALED, hard)
    for method in PTQ:
        record(row(8, method, RESCALED), post_training(hard, 8, method, data[0]))
    for bits in (8, 4):
        record(row(bits, QAT), train_quantized(float_model, bits, *data, settings.qat_epochs))
    return {"wrong": wrong, "seconds": round(time.perf_counter() - started, 1)}


def fold_of(seed: int, fold: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """All images, all labels, and which of them are the test part."""
    images, labels = (tensor[: settings.images] for tensor in digits())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return images, labels, order[fold :: settings.folds]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images `(1797, 1, 32, 32)` and labels `(1797,)`."""
    parts = load_digits()
    return torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])


def train_float(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Train in place with AdamW and a one-cycle learning rate."""
    steps = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    model.train()
    for x, y in batches(images, labels, epochs):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def post_training(model: nn.Module, bits: int, method: str, images: Tensor) -> nn.Module:
    """A calibrated copy of a folded model."""
    quantized = with_quantizers(model, bits, method == CHANNEL, images)
    ranging = PTQ[method]
    calibrate(quantized, calibration(images), ranging, weight_method=ranging, progress=False)
    return quantized


def train_quantized(
    model: nn.Module, bits: int, images: Tensor, labels: Tensor, epochs: int
) -> nn.Module:
    """A copy of a trained model after QAT: learned ranges, and the float model as teacher."""
    student = with_quantizers(model, bits, True, images)
    teacher = qat.Teacher(model)
    schedule = qat.QATSchedule(
        student,
        epochs * (len(labels) // BATCH),
        batches=calibration(images),
        method="mse",
        weight_method="mse",
        ranges="lsq",
        freeze_batchnorm_at=0.8,
        freeze_ranges_at=0.9,
        progress=False,
    )
    groups = qat.parameter_groups(student, lr=4e-3, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(groups)
    student.train()
    for x, y in batches(images, labels, epochs):
        loss = qat.distill_loss(student(x), teacher(x), y, alpha=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(optimizer)
    qat.check_finite(student, loss)
    return student.eval()


def with_quantizers(model: nn.Module, bits: int, per_channel: bool, images: Tensor) -> nn.Module:
    """A copy whose layers and residual additions are quantized, the first and last included."""
    descriptor = QuantDescriptor(bits)
    scheme = Scheme(f"{bits} bits", descriptor, descriptor, per_channel)
    return quantize(copy.deepcopy(model), {"*": scheme}, example_inputs=images[:2])


def calibration(images: Tensor) -> list[Tensor]:
    """Batches of training images."""
    return list(images[:CALIBRATION_IMAGES].split(BATCH))


def batches(images: Tensor, labels: Tensor, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of images that are turned, zoomed and shifted a little."""
    for _ in range(epochs):
        for part in torch.randperm(len(labels)).split(BATCH):
            if len(part) == BATCH:
                yield moved(images[part]), labels[part]


def moved(x: Tensor) -> Tensor:
    """Images turned by up to 10 degrees, zoomed by up to 10 %, shifted by up to 2 pixels."""
    angle, zoom = (torch.rand(2, len(x)) - 0.5) * torch.tensor([[0.35], [0.2]])
    cos, sin = (1 + zoom) * angle.cos(), (1 + zoom) * angle.sin()
    shift = (torch.rand(2, len(x)) - 0.5) * 0.25
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
