r"""What calibration costs: the searches for amax, a collecting forward pass, memory.

    python tools/bench/calibration.py
    python tools/bench/calibration.py --device cuda --batch-size 64
    python tools/bench/calibration.py --quick

prints a Markdown table for docs/performance.md, and exits with status 1 if a bound does not hold.
`--quick` only shows that the benchmark works: its network is too small for the bounds to mean
anything.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import old_search
import torch
from timing import Case, Row, bounded, interleaved, quartiles, ratios, report, status
from torch import Tensor, nn
from tqdm import tqdm

from pytorch_quant import calibrate, compute_amax
from pytorch_quant import nn as quant_nn
from pytorch_quant.calib import HistogramCalibrator
from pytorch_quant.calib.observation import shared_observations
from pytorch_quant.models import BasicBlock, ResNet, resnet50
from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.ptq.ranges import prepare_calibrator, takes_part

Quantizers = dict[str, TensorQuantizer]

SEARCH_SECONDS = 1.0
SEARCH_RATIO = 100.0
# Candidates are edges of bins, and bin 128 is the least: a neighbour is this far away at most.
AMAX_DIFFERENCE = 1 / 128
HISTOGRAM_RATIO = 1.15
MAX_RATIO = 1.05
MEMORY_MIB = 1.0


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    Attributes:
        name: The network, for the table.
        build: Makes it.
        pixels: Height and width of an image.
        batch_size: Images of a batch.
        rounds: Rounds of every timing.
        sampled: Quantizers for which the classical search is timed.
        batches: Of the memory measurement.
        least_seconds: What a timing of a forward pass shall last.
        device: Where the network runs.
    """

    name: str
    build: Callable[[], nn.Module]
    pixels: int
    batch_size: int
    rounds: int
    sampled: int
    batches: int
    least_seconds: float
    device: torch.device

    def batch(self) -> Tensor:
        """Random images."""
        size = (self.batch_size, 3, self.pixels, self.pixels)
        return torch.randn(size).to(self.device)


def network(plan: Plan) -> nn.Module:
    """The network in eval mode, with norms that have seen a batch, calibrated with histograms."""
    model = plan.build().to(plan.device)
    collect(model, {})
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        # The average of all batches instead of a moving one: one batch is enough.
        norm.momentum = None
    with torch.no_grad():
        model.train()(plan.batch())
    calibrate(model.eval(), [plan.batch() for _ in range(2)], method="entropy", progress=False)
    return model


def activations(model: nn.Module) -> Quantizers:
    """The quantizers that collect while batches run."""
    weights = weight_quantizers(model)
    return {
        name: quantizer
        for name, quantizer in named_quantizers(model).items()
        if takes_part(quantizer) and not weights.get(quantizer)
    }


def collect(model: nn.Module, collecting: Quantizers) -> None:
    """Let no quantizer quantize, and these collect: the modes of a calibration."""
    for quantizer in named_quantizers(model).values():
        quantizer.disable_quant()
        quantizer.disable_clip()
        quantizer.disable_calib()
    for quantizer in collecting.values():
        quantizer.enable_calib()


def search_rows(model: nn.Module, plan: Plan) -> list[Row]:
    """`compute_amax` against the classical search."""
    quantizers = activations(model)
    methods = list(old_search.SEARCHES)
    found: dict[str, dict[str, float]] = {}

    def search() -> None:
        for method in methods:
            compute_amax(model, method)

    times = interleaved(
        [Case("search", search)], plan.rounds, device=plan.device, title="compute_amax"
    )
    for method in methods:
        compute_amax(model, method)
        found[method] = {
            name: float(q.amax) for name, q in quantizers.items() if q.amax is not None
        }

    names = list(quantizers)
    # Evenly from input to output, the last one included.
    sampled = [names[(i + 1) * len(names) // plan.sampled - 1] for i in range(plan.sampled)]
    seconds, difference = 0.0, 0.0
    for name in tqdm(sampled, desc="classical search", leave=False):
        calibrator = quantizers[name].calibrator
        assert isinstance(calibrator, HistogramCalibrator) and calibrator.histogram is not None
        counts = calibrator.histogram.counts[0].double().cpu().numpy()
        width, maximum = float(calibrator.histogram.width), float(calibrator.histogram.maximum)
        # A classical histogram ends at the largest value, ours at a power of two above. Candidates
        # in between clip nothing and only round more coarsely: they belong in the time for all
        # bins, but not in the comparison.
        occupied = counts[: counts.nonzero()[0][-1] + 1]
        for method, classical in old_search.SEARCHES.items():
            begin = time.perf_counter()
            classical(counts, width)
            seconds += time.perf_counter() - begin
            amax = min(classical(occupied, width), maximum)
            difference = max(difference, abs(found[method][name] / amax - 1))
    spread = quartiles([t.done for t in times["search"]])
    scaled = seconds / len(sampled) * len(names)
    ratio = scaled / spread.median
    what = f"`compute_amax` of {plan.name}: {', '.join(methods)}"
    return [
        bounded(
            f"{what}, {len(names)} activation quantizers, together",
            spread.median,
            SEARCH_SECONDS,
            f"{spread:.3f} s",
        ),
        bounded(
            f"the classical search, timed for {len(sampled)} of them and scaled up, against it",
            ratio,
            SEARCH_RATIO,
            f"{scaled:.0f} s, {ratio:.0f} times",
            least=True,
        ),
        bounded(
            f"largest relative difference between the amax of both, {len(sampled)} of them",
            difference,
            AMAX_DIFFERENCE,
            f"{difference:.2e}",
        ),
    ]


def pass_cases(model: nn.Module, plan: Plan) -> list[Case]:
    """A forward pass in float32, with histograms, with maxima."""
    batch = plan.batch()
    quantizers = activations(model)

    def run() -> None:
        # A block for each pass: batches of a calibration are different tensors, and what was
        # observed of one must not serve for the next.
        with shared_observations():
            model(batch)

    def switch_to(method: str) -> Callable[[], None]:
        for name, quantizer in quantizers.items():
            prepare_calibrator(quantizer, method, False, name)
        calibrators = {quantizer: quantizer.calibrator for quantizer in quantizers.values()}

        def prepare() -> None:
            for quantizer, calibrator in calibrators.items():
                quantizer._calibrator = calibrator
            collect(model, quantizers)

        return prepare

    return [
        Case("float", run, lambda: collect(model, {})),
        Case("histograms", run, switch_to("entropy")),
        Case("maxima", run, switch_to("max")),
    ]


def pass_rows(model: nn.Module, plan: Plan) -> list[Row]:
    """Collecting passes against the pass in float32."""
    cases = pass_cases(model, plan)
    # As `calibrate` runs batches.
    with torch.no_grad():
        times = interleaved(
            cases,
            plan.rounds,
            device=plan.device,
            least_seconds=plan.least_seconds,
            title="forward passes",
        )
    images = f"batch {plan.batch_size} of {plan.pixels}x{plan.pixels}"
    base = times["float"]
    spread = quartiles([t.done * 1000 for t in base])
    rows = [Row(f"float32 pass of {plan.name}, {images}", f"{spread:.1f} ms")]
    for name, limit in (("histograms", HISTOGRAM_RATIO), ("maxima", MAX_RATIO)):
        spread = quartiles(ratios(times[name], base))
        rows.append(
            bounded(f"pass with {name} / float32 pass", spread.median, limit, f"{spread:.3f}")
        )
        if plan.device.type == "cuda":
            spread = quartiles(ratios(times[name], base, "queued"))
            rows.append(Row("the same, until the host has queued the work", f"{spread:.3f}"))
    if plan.device.type == "cuda":
        rows += [synchronization_row(case) for case in cases[1:]]
    return rows


def synchronization_row(case: Case) -> Row:
    """Whether a pass on the GPU waits for it; torch raises where it would."""
    case.prepare()
    before = torch.cuda.get_sync_debug_mode()
    waited = ""
    with torch.no_grad():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.run()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            waited = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return Row(f"pass with {case.name} waits for the GPU", waited or "no", "no", not waited)


def resident_bytes() -> int:
    """The memory that this process has in RAM; at its peak, where the system tells no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    # In bytes on macOS, in KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_row(plan: Plan) -> Row:
    """What the process grows by, from a tenth of the batches to the last one."""
    model = nn.Sequential(quant_nn.QuantLinear(8, 8), nn.ReLU(), quant_nn.QuantLinear(8, 8))
    model.to(plan.device)
    first = plan.batches // 10
    resident: dict[int, int] = {}

    def batches() -> Iterator[Tensor]:
        for i in tqdm(range(plan.batches + 1), desc="memory", leave=False):
            if i in (first, plan.batches):
                gc.collect()
                resident[i] = resident_bytes()
            if i < plan.batches:
                yield torch.randn(4, 8).to(plan.device)

    calibrate(model, batches(), method="entropy", progress=False)
    grown = (resident[plan.batches] - resident[first]) / 2**20
    what = f"growth of the resident set, batch {first:,} to {plan.batches:,} of a calibration"
    return bounded(f"{what} (MiB)", grown, MEMORY_MIB, f"{grown:.2f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--quick", action="store_true", help="a small network and few rounds")
    add("--batch-size", type=int, default=8, help="images of a batch (default: 8)")
    add("--rounds", type=int, default=7, help="rounds of each timing (default: 7)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    for name in ("batch_size", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --device cpu")
    return args


def make_plan(args: argparse.Namespace) -> Plan:
    """What these arguments ask for."""
    device = torch.device(args.device)
    if args.quick:

        def small() -> nn.Module:
            return ResNet(BasicBlock, [1, 1, 1, 1], 10, quantize=True, small_input=True, width=8)

        rounds = min(args.rounds, 2)
        return Plan("a small ResNet", small, 32, args.batch_size, rounds, 1, 500, 0.02, device)

    def full() -> nn.Module:
        return resnet50(quantize=True)

    return Plan("ResNet-50", full, 224, args.batch_size, args.rounds, 3, 10_000, 0.2, device)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    plan = make_plan(parse(argv))
    torch.manual_seed(0)
    # First, while nothing that was freed is left over to hide growth.
    memory = memory_row(plan)
    model = network(plan)
    # A search needs the statistics of `network`; the passes make their own.
    rows = [*search_rows(model, plan), *pass_rows(model, plan), memory]
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", f"tools/bench/{Path(__file__).name}", *given])
    print(report("Calibration", rows, command, plan.device))
    return status(rows)


if __name__ == "__main__":
    raise SystemExit(main())
