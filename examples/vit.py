"""A vision Transformer in int8: attention quantized, and SmoothQuant for its outlier channels.

    python examples/vit.py
    python examples/vit.py --smoke            # seconds, lower numbers
    python examples/vit.py --outliers 1       # without the outliers of large Transformers

Large Transformers have a few channels behind each LayerNorm that are many times larger than the
others (Dettmers et al., "LLM.int8()", 2022). A small one, trained on handwritten digits, has none,
so that some are made here without a change of the function: the LayerNorm scales a channel up, the
layer behind it scales it down. SmoothQuant (Xiao et al., 2023) undoes that by itself.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pytorch_quant as pq
from pytorch_quant.demo.digits import load_digits
from pytorch_quant.demo.training import predict, top1, train


class Block(nn.Module):
    """Attention and a multilayer perceptron, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """From and to `(N, T, width)`."""
        n, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images `(N, 1, 32, 32)` as 64 patches (Dosovitskiy et al., 2021)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, 10)`."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@torch.no_grad()
def add_outliers(model: ViT, factor: float) -> None:
    """Make two channels behind each LayerNorm `factor` times larger, and their weights smaller."""
    for block in model.blocks:
        for norm, layer in ((block.norm1, block.qkv), (block.norm2, block.mlp[0])):
            for channel in (3, 7):
                norm.weight[channel] *= factor
                norm.bias[channel] *= factor
                layer.weight[:, channel] /= factor


@torch.inference_mode()
def sqnr(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Signal to quantization noise of the logits, in dB: 20 is an error of 10 %, 40 of 1 %."""
    signal, found = model(images), other(images)
    return float(20 * torch.log10(signal.norm() / (found - signal).norm()))


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--outliers", type=float, default=50.0, help="factor of the large channels")
    parser.add_argument("--target", choices=("tensorrt", "onnxruntime"), default="tensorrt")
    parser.add_argument("--output", type=Path, default=Path("runs/vit"), metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="a smaller network, trained less")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train_data, test_data = load_digits()
    batches = [train_data[i] for i in range(4)]
    images = batches[0][0]

    model = ViT(64, 2) if args.smoke else ViT(96, 3)
    train(model, train_data, 8 if args.smoke else 12, 3e-3, "train float")
    add_outliers(model, args.outliers)
    rows = {"float32": (top1(predict(model, test_data, "float32"), test_data), float("inf"))}

    # q, k, v, the softmax and all linear layers but the last; the plan says why that stays float.
    print(pq.placement_plan(model, images, placement=args.target))

    def quantized() -> nn.Module:
        return pq.quantize(copy.deepcopy(model), example_inputs=images, placement=args.target)

    def measured(network: nn.Module, label: str) -> tuple[float, float]:
        accuracy = top1(predict(network, test_data, label), test_data)
        return accuracy, sqnr(model, network, test_data.images)

    for method, options in (("max", {}), ("percentile", {"percentile": 99.99}), ("mse", {})):
        plain = quantized()
        pq.calibrate(plain, batches, method, **options)
        rows[f"int8, {method}"] = measured(plain, method)
    smooth = quantized()
    report = pq.smooth_quant(smooth, batches)
    rows["int8, SmoothQuant"] = measured(smooth, "SmoothQuant")
    print(f"\n{report}")

    varying = ({0: torch.export.Dim.DYNAMIC},)
    file = args.output / "int8.onnx"
    print(pq.export_onnx(smooth, images[:2], file, target=args.target, dynamic_shapes=varying))
    rows["int8.onnx in ONNX Runtime"] = measured(pq.load(file, "onnxruntime"), "ONNX Runtime")
    size = sum(p.numel() for p in model.parameters()) * 4

    print(f"\n{'model':<28}{'top-1 %':>9}{'SQNR dB':>9}\n{'-' * 46}")
    print("\n".join(f"{name:<28}{acc:>9.2f}{db:>9.1f}" for name, (acc, db) in rows.items()))
    print(f"\nfile, KB: int8 {file.stat().st_size / 1e3:.0f}, float weights {size / 1e3:.0f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
