"""Calibrate on several processes, each with its share of the images, as one would on all of them.

    torchrun --nproc-per-node 2 examples/distributed_calibration.py
    torchrun --nproc-per-node 2 examples/distributed_calibration.py --method entropy
    python examples/distributed_calibration.py
    torchrun --nproc-per-node 2 examples/distributed_calibration.py --smoke    # fewer images

Only the first process prints. It compares the ranges: they are equal, bit for bit,
on all processes and to those of one process. With a GPU for each process they talk over NCCL,
otherwise over Gloo. The images are scikit-learn's handwritten digits, or noise without it. The
weights are random; your own model and loader take the place of `small_network` and `images`.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pytorch_quant import calibrate, quant_modules
from pytorch_quant.demo.digits import load_digits

METHODS = ("max", "percentile", "mse", "entropy", "lp")
BATCH = 64


def images() -> Tensor:
    """Images of shape `(N, 1, 32, 32)`, the same in every process."""
    try:
        return load_digits()[0].images
    except ImportError:
        return torch.randn(1000, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def small_network() -> nn.Module:
    """A float network with quantizers, the same in every process."""
    torch.manual_seed(0)
    with quant_modules.initialize():
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 8 * 8, 10),
        )


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether the state of two models is the same, bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(value.cpu(), second[name].cpu()) for name, value in first.items()
    )


def main() -> None:
    """Calibrate on all processes and on one, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", default="mse", choices=METHODS)
    parser.add_argument("--smoke", action="store_true", help="on 300 images")
    args = parser.parse_args()
    method = args.method
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    data = images()[:300] if args.smoke else images()
    batches = [batch.to(device) for batch in data.split(BATCH)]
    model = small_network().to(device)
    # Every size-th batch; the shares need not be equal.
    report = calibrate(model, batches[rank::size], method, progress=False)

    states = [model.state_dict()]
    if size > 1:
        states = [{} for _ in range(size)]
        dist.all_gather_object(states, {k: v.cpu() for k, v in model.state_dict().items()})
        dist.destroy_process_group()
    if rank == 0:
        print(report)
        alone = small_network().to(device)
        calibrate(alone, batches, method, progress=False)
        print(f"{report.batches} batches on {size} process(es), method {method}")
        print(f"equal on all processes: {all(equal(states[0], state) for state in states)}")
        print(f"equal to one process:   {equal(states[0], alone.state_dict())}")


if __name__ == "__main__":
    main()
