r"""What fake quantization adds to a training step of a ResNet-18: forward, backward, SGD.

    OMP_NUM_THREADS=2 python tools/bench/qat_step.py
    python tools/bench/qat_step.py --compile --json qat_step.json
    python tools/bench/qat_step.py --device cuda --batch-size 256 --bfloat16 --compile
    python tools/bench/qat_step.py --quick

prints a Markdown table, also as JSON with `--json`, and exits with status 1 if a bound does not
hold. `--quick` only shows that the benchmark works: its network is too small for the bounds to mean
anything. `--bfloat16` runs under autocast and with channels-last images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import qat_networks
import torch
from run_options import checked, finish
from timing import Case, Row
from torch import nn
from torch.nn import functional as F

EAGER_RATIO = 1.08
COMPILED_RATIO = 1.05


def step_of(model: nn.Module, work: qat_networks.Work) -> Callable[[], None]:
    """One training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        with work.autocast():
            loss = F.cross_entropy(model(work.images), work.targets)
        loss.backward()
        optimizer.step()

    return run


def rows_of(models: dict, work: qat_networks.Work, prefix: str) -> list[Row]:
    """Every model against the first one."""
    cases = [Case(name, step_of(model, work)) for name, model in models.items()]
    times = work.interleaved(cases, f"{prefix}training")
    limit = COMPILED_RATIO if prefix else EAGER_RATIO
    return qat_networks.against_float(times, prefix, f"step of {work.what}", limit)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    qat_networks.add_network_options(parser)
    return checked(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    args = parse(argv)
    torch.manual_seed(0)
    rows = qat_networks.measure(args, "train", rows_of)
    return finish("Training", rows, args, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
