r"""What fake quantization adds to the memory that training a ResNet-50 takes.

    python tools/bench/qat_memory.py
    python tools/bench/qat_memory.py --device cuda --batch-size 64 --json memory.json
    python tools/bench/qat_memory.py --quick

prints a Markdown table, also as JSON with `--json`, and exits with status 1 if a bound does not
hold. Each case trains in a process of its own. On the CPU its peak is that of the resident memory,
less what was there before the network was made; on a GPU that of what torch allocated. `--quick`
only shows that the benchmark works: its network is too small for the bound to mean anything.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import torch
from qat_networks import EVERYWHERE, FLOAT, LAYERS, network
from run_options import add_common_options, checked, finish, return_freed_memory
from timing import Row, bounded
from torch.nn import functional as F

from pytorch_quant import calibrate, qat
from pytorch_quant.models import resnet50

LIMIT = 1.25
STEPS = 2
MIB = 2**20
# What is quantized, and whether the backward pass quantizes again.
CASES = {
    "float": (FLOAT, False),
    "pytorch_quant": (LAYERS, False),
    "pytorch_quant in `rematerialize`": (LAYERS, True),
    "pytorch_quant with its additions": (EVERYWHERE, False),
    "pytorch_quant with its additions in `rematerialize`": (EVERYWHERE, True),
}


def peak(kind: str, again: bool, args: argparse.Namespace) -> int:
    """Bytes at the peak of some training steps; meant for a process of its own.

    Args:
        kind: As for `qat_networks.network`.
        again: Whether to train in `qat.rematerialize`.
        args: The command line.
    """
    return_freed_memory()
    torch.manual_seed(0)
    pixels = 32 if args.quick else 224
    images = torch.randn(args.batch_size, 3, pixels, pixels, device=args.device)
    targets = torch.randint(0, 10, (args.batch_size,), device=args.device)
    before = _peak(args.device)
    model = network(kind, None if args.quick else resnet50).to(args.device)
    if kind != FLOAT:
        calibrate(model.eval(), [images[:1]], progress=False)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with qat.rematerialize() if again else nullcontext():
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
    return _peak(args.device) - before


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    # KiB on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each case."""
    spawn = multiprocessing.get_context("spawn")
    peaks = {}
    for name, (kind, again) in CASES.items():
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            peaks[name] = process.submit(peak, kind, again, args).result()
    base, *others = CASES
    what = "a small ResNet" if args.quick else "ResNet-50"
    what += f", batch {args.batch_size}, momentum"
    rows = [Row(f"{base} training of {what}", f"{peaks[base] / MIB:.0f} MiB")]
    for name in others:
        ratio = peaks[name] / peaks[base]
        if CASES[name][1]:
            rows.append(bounded(f"{name} / {base}", ratio, LIMIT, f"{ratio:.2f}"))
        else:
            rows.append(Row(f"{name} / {base}", f"{ratio:.2f}"))
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add_common_options(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="images (default: 16)")
    return checked(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    args = parse(argv)
    return finish("Memory of training", measure(args), args, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
