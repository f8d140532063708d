r"""What fake quantization costs, forward and backward, against copying the tensor.

    OMP_NUM_THREADS=2 python tools/bench/fake_quant.py
    python tools/bench/fake_quant.py --compile --json fake_quant.json
    python tools/bench/fake_quant.py --device cuda --compile
    python tools/bench/fake_quant.py --quick

prints a Markdown table, also as JSON with `--json`, and exits with status 1 if a bound does not
hold. `--quick` only shows that the benchmark works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import qat_peers
import torch
from run_options import add_options, checked, finish
from timing import Case, Row, bounded, interleaved, quartiles, ratios
from torch import Tensor

from pytorch_quant.fake_quant import fake_quantize
from pytorch_quant.formats import make_format

EAGER_RATIO = 2.2
COMPILED_RATIO = 1.15
# An activation of a residual network, 6.4 million values.
SHAPE, SMALL_SHAPE = (32, 64, 56, 56), (2, 8, 16, 16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}

Function = Callable[[Tensor], Tensor]


def both_ways(function: Function, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """One forward and backward pass that leaves a gradient in `x`."""

    def run() -> None:
        x.grad = None
        function(x).backward(grad)

    return run


def rows_of(
    name: str, functions: dict[str, Function], limits: dict[str, float], args: argparse.Namespace
) -> list[Row]:
    """Every function against the first one.

    Args:
        name: What is quantized, for the table.
        functions: By name.
        limits: The bound of a ratio, by the name of the function.
        args: The command line.
    """
    shape = SMALL_SHAPE if args.quick else SHAPE
    layout = LAYOUTS[args.layout]
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    x = torch.randn(shape).to(device, dtype, memory_format=layout).requires_grad_()
    grad = torch.randn(shape).to(device, dtype, memory_format=layout)
    cases = [Case(key, both_ways(function, x, grad)) for key, function in functions.items()]
    seconds = 1e-4 if args.quick else 0.02
    times = interleaved(cases, args.rounds, device=device, least_seconds=seconds, title=name)
    base, *others = functions
    spread = quartiles([t.done * 1000 for t in times[base]])
    rows = [Row(f"{name}: {base}, forward and backward", f"{spread:.3f} ms")]
    for key in others:
        spread = quartiles(ratios(times[key], times[base]))
        least = min(t.done for t in times[key]) / min(t.done for t in times[base])
        what, measured = f"{name}: {key} / {base}", f"{spread:.2f}, of the least times {least:.2f}"
        if key in limits:
            rows.append(bounded(what, spread.median, limits[key], measured))
        else:
            rows.append(Row(what, measured))
    return rows


def measure(args: argparse.Namespace) -> list[Row]:
    """All rows."""
    device, fmt = torch.device(args.device), make_format(8)
    shape = SMALL_SHAPE if args.quick else SHAPE
    channels = (torch.rand(1, shape[1], 1, 1) + 2.5).to(device)
    rows: list[Row] = []
    for kind, amax, axis in (
        ("per tensor", torch.tensor(3.0, device=device), None),
        ("per channel", channels, 1),
    ):

        def ours(x: Tensor, amax: Tensor = amax) -> Tensor:
            return fake_quantize(x, amax, fmt)

        eager: dict[str, Function] = {"clone": torch.clone, "pytorch_quant": ours}
        eager.update(qat_peers.fake_quantizers(amax, axis))
        limits = {"pytorch_quant": EAGER_RATIO} if args.dtype == "float32" else {}
        rows += rows_of(f"eager, {kind}", eager, limits, args)
        if args.compile:
            compiled: dict[str, Function] = {
                "compiled clone": torch.compile(torch.clone),
                "compiled pytorch_quant": torch.compile(ours, fullgraph=True),
            }
            limits = {"compiled pytorch_quant": COMPILED_RATIO}
            rows += rows_of(f"compiled, {kind}", compiled, limits, args)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add_options(parser, rounds=25)
    parser.add_argument("--layout", default="contiguous", choices=tuple(LAYOUTS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return checked(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    args = parse(argv)
    torch.manual_seed(0)
    return finish("Fake quantization", measure(args), args, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
