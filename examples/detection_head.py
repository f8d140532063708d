"""A small YOLO-style detector in int8: concatenations quantized with one range, the head in float.

    python examples/detection_head.py
    python examples/detection_head.py --smoke     # seconds, lower numbers

It draws its own images: squares, discs and crosses on noise. Scales are concatenated as in a
feature pyramid; TensorRT wants one range for all that is joined. The rule `{"head*": None}` keeps
the head float, as is usual for detectors. Then the file is compared with the simulation.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import pytorch_quant as pq

SIZE, GRID, KINDS = 64, 8, 3
CELL = SIZE // GRID


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images `(N, 1, SIZE, SIZE)`, and for each cell `(N, GRID, GRID, 6)`: 1, kind, x, y, w, h."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    cells = torch.zeros(count, GRID, GRID, 6)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for i in range(count):
        for _ in range(3):
            chance = torch.rand(5, generator=generator).tolist()
            kind = int(KINDS * chance[0])
            y, x = (12 + c * (SIZE - 24) for c in chance[1:3])
            half_h, half_w = (4 + 8 * c for c in chance[3:])
            dy, dx = ((rows - y) / half_h).abs(), ((columns - x) / half_w).abs()
            square = dy.maximum(dx) < 1
            shape = (square, dy**2 + dx**2 < 1, square & (dy.minimum(dx) < 0.3))[kind]
            images[i, 0][shape] += 1.0 + kind / 2
            box = (x / CELL % 1, y / CELL % 1, math.log(half_w / 4), math.log(half_h / 4))
            cells[i, int(y / CELL), int(x / CELL)] = torch.tensor([1.0, kind, *box])
    return images, cells


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """Two scales, joined on the way back; one prediction for each cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, width, 3, 2), conv(width, width, 3, 2))
        self.down1, self.down2 = conv(width, 2 * width, 3, 2), conv(2 * width, 4 * width, 3, 2)
        self.left, self.right = conv(4 * width, 2 * width, 1), conv(4 * width, 2 * width)
        self.lateral = conv(2 * width, 2 * width, 1)
        self.join = conv(6 * width, 4 * width)
        self.head = nn.Sequential(conv(4 * width, 4 * width), nn.Conv2d(4 * width, 5 + KINDS, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits and boxes `(N, 5 + KINDS, GRID, GRID)`: object, x, y, w, h, kinds."""
        eighth = self.down1(self.stem(images))
        deep = self.down2(eighth)
        deep = torch.cat([self.left(deep), self.right(deep)], 1)
        joined = torch.cat([F.interpolate(deep, scale_factor=2), self.lateral(eighth)], 1)
        return self.head(self.join(joined))


def loss_of(found: Tensor, cells: Tensor) -> Tensor:
    """Cross entropy of object and kind, and the absolute error of boxes where there is one."""
    found, there = found.permute(0, 2, 3, 1), cells[..., 0] > 0
    objects = F.binary_cross_entropy_with_logits(found[..., 0], cells[..., 0])
    kinds = F.cross_entropy(found[there][:, 5:], cells[there][:, 1].long())
    return objects + 0.5 * kinds + F.l1_loss(found[there][:, 1:5], cells[there][:, 2:])


def train(model: nn.Module, images: Tensor, cells: Tensor, steps: int) -> None:
    """Random batches of 32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="train float"):
        part = torch.randint(len(images), (32,))
        loss = loss_of(model(images[part]), cells[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, cells: Tensor) -> tuple[float, float, float]:
    """Found objects (recall) and right ones among them (precision), percent; error of sizes, %."""
    found = torch.cat([model(part) for part in images.split(32)]).permute(0, 2, 3, 1)
    there, seen = cells[..., 0] > 0, found[..., 0] > 0
    right = there & seen & (found[..., 5:].argmax(-1) == cells[..., 1])
    error = (found[there][:, 3:5] - cells[there][:, 4:]).abs().mean()
    recall, precision = right.sum() / there.sum(), right.sum() / seen.sum().clamp(min=1)
    return 100 * float(recall), 100 * float(precision), 100 * float(error)


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/detection_head"), metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="trained less, on fewer images")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images, cells = draw(256 if args.smoke else 1024, seed=0)
    unseen = draw(128 if args.smoke else 256, seed=1)

    model = Detector(32)
    train(model, images, cells, 100 if args.smoke else 400)
    rows = {"float32": evaluate(model, *unseen)}

    for label, rule in {"int8": {"": pq.INT8}, "int8, float head": {"head*": None}}.items():
        int8 = copy.deepcopy(model)
        pq.fold_batchnorm(int8, images[:2])
        plan = pq.placement_plan(int8, images[:2], rule)
        pq.quantize(int8, rule, example_inputs=images[:2])
        pq.calibrate(int8, images[:256].split(32), "percentile", percentile=99.99)
        rows[label] = evaluate(int8, *unseen)
    for quantizer in plan.quantizers:
        if len(sites := dict.fromkeys(place.site for place in quantizer.places)) > 1:
            print("one range for", ", ".join(sites))

    file = args.output / "detector.onnx"
    print(pq.export_onnx(int8, images[:4], file, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)))
    rows["detector.onnx"] = evaluate(pq.load(file, "onnxruntime"), *unseen)
    print(pq.verify_onnx(file, int8, unseen[0][:4], engines=["onnxruntime"]))
    print(f"lint: {pq.lint_onnx(file)}")

    print(f"\n{'model':<20}{'recall %':>10}{'precision %':>13}{'size error %':>14}\n{'-' * 57}")
    for name, (recall, precision, error) in rows.items():
        print(f"{name:<20}{recall:>10.2f}{precision:>13.2f}{error:>14.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
