"""Leave the layers that hurt in float: rank, exclude, quantize again, evaluate again.

    python examples/partial_quantization.py
    python examples/partial_quantization.py --smoke          # seconds, lower numbers
    python examples/partial_quantization.py --bits 8 --max-drop 0.1

A small network learns handwritten digits; then two of its layers are made hard to quantize, with
one channel a few hundred times larger than the others, as happens in networks of others. Float
accuracy stays what it was. `sensitivity` finds the layers, and its exclude list restores accuracy.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import nn

import pytorch_quant as pq
from pytorch_quant.demo.digits import load_digits
from pytorch_quant.demo.training import predict, top1, train


def network() -> nn.Sequential:
    """A convolutional network for images `(N, 1, 32, 32)`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


@torch.no_grad()
def make_hard(model: nn.Sequential, layer: int, factor: float) -> None:
    """Scale a channel of the input of `layer` up and its weights down: the function is the same."""
    before, after = model[layer - 2], model[layer]
    assert isinstance(before, nn.Conv2d) and isinstance(after, nn.Conv2d)
    before.weight[0] *= factor
    before.bias[0] *= factor
    after.weight[:, 0] /= factor


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--bits", type=int, default=8, help="of weights and activations")
    parser.add_argument("--factor", type=float, default=300.0, help="how large the channel is")
    parser.add_argument("--max-drop", type=float, default=0.5, help="of top-1, in percent")
    parser.add_argument("--smoke", action="store_true", help="train less")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    train_data, test_data = load_digits()
    batches = [train_data[i] for i in range(4)]
    images = batches[0][0]

    model = network()
    train(model, train_data, 3 if args.smoke else 12, 2e-3, "train float")
    for layer in (4, 8):
        make_hard(model, layer, args.factor)

    def evaluate(network: nn.Module) -> float:
        return top1(predict(network, test_data, "evaluate"), test_data)

    def quantized(rules: dict[Any, Any]) -> nn.Module:
        made = copy.deepcopy(model)
        pq.quantize(made, {"": pq.INT8, **rules}, example_inputs=images)
        for part in made.modules():
            if isinstance(part, pq.TensorQuantizer):
                part.num_bits = args.bits
        pq.calibrate(made, batches, "max")
        return made

    int8 = quantized({})
    rows = {"float32": evaluate(model), "int8, all layers": evaluate(int8)}

    # Ranked by the SQNR of the output with one layer quantized: no labels, a few passes.
    ranking = pq.sensitivity(int8, batches)
    print(ranking)
    for count in (1, 2, 3):
        rules = ranking.exclude(count)
        rows[f"float: {', '.join(rules)}"] = evaluate(quantized(rules))

    # As few layers as the accuracy allows, measured with `evaluate` at each step.
    rules = pq.sensitivity(int8, batches, evaluate, method="sqnr").exclude(max_drop=args.max_drop)
    rows[f"drop <= {args.max_drop:g}: {', '.join(rules) or 'none'}"] = evaluate(quantized(rules))

    # One backward pass for all layers instead of a pass for each: for large networks.
    fisher = pq.sensitivity(int8, batches, method="fisher")
    print(f"\nby gradients (fisher): {', '.join(fisher.exclude(2))}")
    print(f"\n{'model':<28}{'top-1 %':>9}\n{'-' * 37}")
    print("\n".join(f"{name:<28}{value:>9.2f}" for name, value in rows.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
