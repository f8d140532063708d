"""Static quantization of a MobileNet: per tensor, per channel, fine-tuned; then really in int8.

    python examples/static_mobilenet.py
    python examples/static_mobilenet.py --smoke     # seconds, lower numbers

The steps of PyTorch's eager-mode guide on a small MobileNetV2 and handwritten digits: min-max with
a scale for each weight tensor, histograms with one for each channel, and quantization-aware
training with batch norm and ranges frozen at the end.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import pytorch_quant as pq
from pytorch_quant.demo.digits import Split, load_digits
from pytorch_quant.demo.training import top1, train

ENGINE = "onnxruntime"  # or "openvino"


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[Any]:
    """A convolution with batch norm, without an activation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow (Sandler et al., "MobileNetV2", 2018, figure 3)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *conv(inputs, wide), nn.ReLU6(),
            *conv(wide, wide, 3, stride, groups=wide), nn.ReLU6(),
            *conv(wide, outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Add the input where shapes allow it."""
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet(width: int) -> nn.Sequential:
    """A MobileNetV2 for images `(N, 1, 32, 32)`, `width` channels wide at first."""
    a, b, c, d, e = width, 3 * width // 2, 2 * width, 3 * width, 12 * width
    stages = [(a, b, 2), (b, b, 1), (b, c, 2), (c, c, 1), (c, d, 1)]
    return nn.Sequential(
        *conv(1, a, 3, 2), nn.ReLU6(),
        *(InvertedResidual(*stage) for stage in stages),
        *conv(d, e), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(e, 10),
    )  # fmt: skip


@torch.inference_mode()
def evaluate(model: nn.Module, data: Split) -> tuple[float, float]:
    """Top-1 in percent, and the mean cross entropy."""
    logits = torch.cat([model(images) for images, _ in tqdm(data, "evaluate", leave=False)])
    return top1(logits.argmax(1), data), float(F.cross_entropy(logits, data.labels))


def fine_tune(model: nn.Module, data: Split, batches: list[Any], epochs: int) -> None:
    """Quantization-aware training: a tenth of the learning rate, frozen statistics at the end."""
    steps = epochs * (len(data.images) // data.batch_size)
    schedule = pq.qat.QATSchedule(model, steps, batches=batches, method="mse", ranges="moving")
    optimizer = torch.optim.AdamW(pq.qat.parameter_groups(model, lr=4e-4, weight_decay=1e-2))
    generator = torch.Generator().manual_seed(1)
    model.train()
    with tqdm(total=steps, desc="fine-tune") as bar:
        for _ in range(epochs):
            for images, labels in data.shuffled(generator):
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step(optimizer)
                bar.update()
    model.eval()


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/static_mobilenet"), metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="a narrow network, trained less")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train_data, test_data = load_digits()
    batches = [train_data[i] for i in range(8)]
    images = batches[0][0]

    model = mobilenet(16 if args.smoke else 48)
    train(model, train_data, 4 if args.smoke else 15, 4e-3, "train float")
    rows = {"float32": evaluate(model, test_data)}

    def quantized(scheme: pq.Scheme, *, fold: bool = True) -> nn.Module:
        # "" is the whole model: also layers that TensorRT would rather run in float.
        made = copy.deepcopy(model)
        if fold:
            pq.fold_batchnorm(made, images)
        pq.quantize(made, {"": scheme}, example_inputs=images, placement=ENGINE)
        return made

    per_tensor = quantized(pq.INT8_PER_TENSOR)
    pq.calibrate(per_tensor, batches, "max")
    rows["per tensor, min-max"] = evaluate(per_tensor, test_data)

    per_channel = quantized(pq.INT8)
    pq.calibrate(per_channel, batches, "mse")
    rows["per channel, histogram"] = evaluate(per_channel, test_data)

    tuned = quantized(pq.INT8, fold=False)
    fine_tune(tuned, train_data, batches, 1 if args.smoke else 6)
    pq.fold_batchnorm(tuned, images)
    rows["fine-tuned (QAT)"] = evaluate(tuned, test_data)

    # What was simulated until here, with integer kernels.
    pq.fold_batchnorm(model, images)
    files = [args.output / "float32.onnx", args.output / "int8.onnx"]
    for network, file in zip((model, tuned), files, strict=True):
        runtime = pq.convert(network, images[:1], ENGINE)
        runtime.save(file)
    rows["the same in ONNX Runtime"] = evaluate(runtime, test_data)

    print(f"\n{'model':<28}{'top-1 %':>9}{'loss':>10}\n{'-' * 47}")
    print("\n".join(f"{name:<28}{top1:>9.2f}{loss:>10.4f}" for name, (top1, loss) in rows.items()))
    print()
    print(pq.compare_latency(files, engine=ENGINE, rounds=200))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
