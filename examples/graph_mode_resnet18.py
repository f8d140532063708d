"""Quantize a ResNet-18 as it is: rules for its layers, residual adds found, no line of it edited.

    python examples/graph_mode_resnet18.py
    python examples/graph_mode_resnet18.py --smoke                 # seconds, lower numbers
    python examples/graph_mode_resnet18.py --target openvino

The steps of PyTorch's FX graph-mode guide: a rule for all, for a type, for a glob and for one name;
batch norm folded; residual additions quantized where the runtime wants it; the model saved and
loaded; weights and activations compared with float; size and speed beside float. The network is
`torchvision`'s ResNet-18 in a narrow form, on handwritten digits.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

import pytorch_quant as pq
from pytorch_quant.demo.digits import load_digits
from pytorch_quant.demo.training import predict, top1, train
from pytorch_quant.models import resnet18

# From weak to strong: the default, types and functions, globs, exact names. A later one wins
# among those of one kind.
RULES = {
    nn.Linear: pq.INT8_PER_TENSOR,  # a type
    "layer4.*": pq.INT8_PER_TENSOR,  # a glob
    "layer4.1.conv2": pq.INT8,  # a name, which is stronger than the glob
    "fc": None,  # float, whatever its type says
}


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--target", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/graph_mode_resnet18"), metavar="DIR"
    )
    parser.add_argument("--smoke", action="store_true", help="a narrower network, trained less")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train_data, test_data = load_digits()
    batches = [train_data[i] for i in range(8)]
    images = batches[0][0]

    def build() -> nn.Module:
        return resnet18(num_classes=10, in_channels=1, width=16 if args.smoke else 32)

    model = build()
    train(model, train_data, 3 if args.smoke else 12, 4e-3, "train float")
    rows = {"float32": top1(predict(model, test_data, "float32"), test_data)}

    # What would happen, and why; this edits nothing.
    plan = pq.placement_plan(model, images, RULES, placement=args.target)
    placed = {(p.site, p.operand): q.descriptor for q in plan.quantizers for p in q.places}
    print(f"\n{'layer':<28}{'weight':>16}\n{'-' * 44}")
    for name in ("conv1", "layer3.1.conv2", "layer4.1.conv1", "layer4.1.conv2", "fc"):
        weight = placed.get((name, ("weight",)))
        form = "float" if weight is None else "per tensor" if weight.axis is None else "per channel"
        print(f"{name:<28}{form:>16}")
    adds = {site for site, _ in placed if "/add#" in site}
    print(f"quantizers: {len(plan.quantizers)}; additions with quantizers: {len(adds)}")
    (args.output / "plan.txt").write_text(str(plan))

    def quantized(weights: nn.Module) -> nn.Module:
        made = copy.deepcopy(weights).eval()
        pq.fold_batchnorm(made, images)
        return pq.quantize(made, RULES, example_inputs=images, placement=args.target)

    int8 = quantized(model)
    pq.calibrate(int8, batches, "percentile", percentile=99.99)
    rows["int8"] = top1(predict(int8, test_data, "int8"), test_data)

    torch.save(int8.state_dict(), args.output / "int8.pt")
    loaded = quantized(build())
    loaded.load_state_dict(torch.load(args.output / "int8.pt"))
    rows["int8, saved and loaded"] = top1(predict(loaded, test_data, "loaded"), test_data)

    folded = copy.deepcopy(model)
    pq.fold_batchnorm(folded, images)
    comparison = pq.compare_models(folded, int8, images)
    worst = sorted(comparison.weights, key=lambda row: row.sqnr_db)[:5]
    print(f"\n{'weights that changed most':<28}{'SQNR dB':>9}{'max difference':>16}\n{'-' * 53}")
    for row in worst:
        print(f"{row.name:<28}{row.sqnr_db:>9.1f}{row.max_difference:>16.5f}")
    print(f"first difference: {comparison.first_divergence.label}")

    files = [args.output / "float32.onnx", args.output / "int8.onnx"]
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    for network, file in zip((folded, loaded), files, strict=True):
        pq.export_onnx(network, images[:2], file, target=args.target, dynamic_shapes=(any_size,))
    runtime = pq.load(files[1], args.target)
    rows[f"int8 in {args.target}"] = top1(predict(runtime, test_data, args.target), test_data)

    print(f"\n{'model':<28}{'top-1 %':>9}\n{'-' * 37}")
    print("\n".join(f"{name:<28}{value:>9.2f}" for name, value in rows.items()))
    print()
    print(pq.compare_latency(files, engine=args.target, rounds=300, shapes={"x": (1, 1, 128, 128)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
