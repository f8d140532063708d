r"""What fake quantization adds to the inference of a ResNet-18.

    OMP_NUM_THREADS=2 python tools/bench/inference_overhead.py
    python tools/bench/inference_overhead.py --compile --json inference.json
    python tools/bench/inference_overhead.py --device cuda --batch-size 256 --bfloat16 --compile
    python tools/bench/inference_overhead.py --quick

prints a Markdown table, also as JSON with `--json`, and exits with status 1 if a bound does not
hold. `--quick` only shows that the benchmark works: its network is too small for the bounds to mean
anything. `--bfloat16` runs under autocast and with channels-last images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack

import qat_networks
import torch
from run_options import checked, finish
from timing import Case, Row, interleaved, quartiles, ratios

from pytorch_quant import cached_weights

EAGER_RATIO = 1.10
COMPILED_RATIO = 1.05


def rows_of(models: dict, work: qat_networks.Work, prefix: str) -> list[Row]:
    """Every model against the first one."""

    def forward(name: str) -> Callable[[], None]:
        def run() -> None:
            with work.autocast():
                models[name](work.images)

        return run

    args, base = work.args, "float"
    cases = [Case(name, forward(name)) for name in models]
    with torch.no_grad(), ExitStack() as scopes:
        for name in models:
            if name.startswith("pytorch_quant"):
                scopes.enter_context(cached_weights(models[name]))
        times = work.interleaved(cases, f"{prefix}inference")
    limit = COMPILED_RATIO if prefix else EAGER_RATIO
    what, scope = f"pass of {work.what}", " inside of `cached_weights`"
    rows = qat_networks.against_float(times, prefix, what, limit, scope)
    if not prefix:
        with torch.no_grad():
            names = [base, "pytorch_quant"]
            pair = interleaved(
                [Case(name, forward(name)) for name in names],
                args.rounds,
                device=args.device,
                least_seconds=1e-4,
                title="without the scope",
            )
        spread = quartiles(ratios(pair["pytorch_quant"], pair[base]))
        rows.append(Row(f"pytorch_quant outside of the scope / {base}", f"{spread:.3f}"))
    return rows


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
    rows = qat_networks.measure(args, "eval", rows_of)
    return finish("Inference", rows, args, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
