"""Quantize, calibrate, export and run every network of the coverage table, and write the table.

    python tools/model_coverage.py                       all networks, then docs/model_coverage.md
    python tools/model_coverage.py resnet18 'vit_*'      these alone, to the terminal
    python tools/model_coverage.py --resume --jobs 2     those that do not pass yet, two at a time

Each network has random weights, and batch-norm statistics of random images: otherwise its
activations would vanish or overflow, and nothing would be tested. The exported file runs in ONNX
Runtime with optimizations off, next to the fake-quantized model. A random network amplifies one
code that rounding moved, so the yardstick is the model itself: how far do its outputs move when its
input moves by 1e-6?
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torchvision
from coverage_models import Entry, own_entries, torchvision_entries
from torch import Tensor, nn
from tqdm import tqdm

import pytorch_quant as pq
from pytorch_quant.batches import call_model, tensors_in
from pytorch_quant.export.lint import lint_onnx

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "model_coverage.md"
RESULTS = ROOT / ".model_coverage.json"
MOVED = 1e-6
BATCHES = 5
MOVES = 3
# The file may have two codes moved where the model had one.
FACTOR = 2
# Two outputs of float32 arithmetic in different order differ by this much anyway.
ROUNDING = 1e-5
STEPS = 10


@dataclass
class Row:
    """What one network did.

    Attributes:
        name, family: As in its entry.
        quantizers: How many of each kind: conv, linear, matmul, add, cat, ... and weights.
        left: Layers and calls that could be quantized and stay float.
        difference: Largest difference between the file's outputs and those of the fake-quantized
            model, over the largest output; the median of several batches.
        moved: The same between the model and itself when its input moves by 1e-6; the largest of
            several moves of each batch.
        findings: Of severity error or performance in the file.
        seconds: From building to the last check.
        problem: Why it does not pass; empty if it does.
    """

    name: str
    family: str
    quantizers: dict[str, int]
    left: int = 0
    difference: float = 0.0
    moved: float = 0.0
    findings: int = 0
    seconds: float = 0.0
    problem: str = ""


def cover(entry: Entry) -> Row:
    """Take one network all the way."""
    row, started = Row(entry.name, entry.family, {}), time.perf_counter()
    try:
        _cover(entry, row)
    except Exception as error:
        row.problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        traceback.print_exc()
    row.seconds = time.perf_counter() - started
    return row


def _cover_by_name(name: str) -> Row:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return cover(next(e for e in own_entries() + torchvision_entries()[0] if e.name == name))


def _cover(entry: Entry, row: Row) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = entry.build()
    _warm_batch_norm(model, [entry.inputs(2, generator) for _ in range(4)])
    example = entry.inputs(2, generator)
    plan = pq.placement_plan(model, example)
    row.quantizers = dict(Counter(q.op for q in plan.quantizers))
    row.left = len(plan.left)
    pq.quantize(model, example_inputs=example)
    pq.calibrate(model, [entry.inputs(2, generator) for _ in range(2)], progress=False)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        arguments, names = _as_arguments(example)
        pq.export_onnx(_Positional(model, names) if names else model, arguments, path)
        findings = [f for f in lint_onnx(path) if f.severity in ("error", "performance")]
        differences = []
        with torch.no_grad():
            for batch in [example, *(entry.inputs(2, generator) for _ in range(BATCHES - 1))]:
                expected = _outputs(model, batch)
                differences.append(_distance(expected, _run(path, _as_arguments(batch)[0])))
                for _ in range(MOVES):
                    again = _outputs(model, _moved(batch, generator))
                    row.moved = max(row.moved, _distance(expected, again))
    row.difference = statistics.median(differences)
    row.findings = len(findings)
    if row.difference > FACTOR * row.moved + ROUNDING:
        row.problem = f"differs by {row.difference:.1e}"
    elif findings:
        first = findings[0]
        row.problem = f"{len(findings)} findings: {first.rule} at {first.node}: {first.message}"
    else:
        _fine_tune(model, example)


def _warm_batch_norm(model: nn.Module, batches: list[Any]) -> None:
    """Give every batch norm the statistics of the batches."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        for batch in batches:
            call_model(model, batch)
    model.eval()


def _fine_tune(model: nn.Module, example: Any) -> None:
    """A few steps of training, in train mode: the recorded calls must still be there."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for _ in range(STEPS):
        loss = sum(t.float().square().mean() for t in tensors_in(call_model(model, example)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()


def _outputs(model: nn.Module, example: Any) -> list[np.ndarray]:
    return [t.numpy() for t in tensors_in(call_model(model, example)) if t.is_floating_point()]


def _moved(example: Any, generator: torch.Generator) -> Any:
    if isinstance(example, Tensor):
        if not example.is_floating_point():
            return example
        return example + MOVED * (2 * torch.rand(example.shape, generator=generator) - 1)
    if isinstance(example, dict):
        return {key: _moved(value, generator) for key, value in example.items()}
    return tuple(_moved(value, generator) for value in example)


def _distance(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    """The largest difference of any output, over the largest magnitude of that output."""
    return max(
        float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
        for a, b in zip(expected, got, strict=True)
    )


class _Positional(nn.Module):
    """Takes by position what the model takes by name."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True)))


def _as_arguments(example: Any) -> tuple[tuple[Tensor, ...], list[str]]:
    if isinstance(example, dict):
        return tuple(example.values()), list(example)
    return (example,) if isinstance(example, Tensor) else tuple(example), []


def _run(path: Path, arguments: tuple[Tensor, ...]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feeds = dict(zip(names, [a.numpy() for a in arguments], strict=True))
    return [y for y in session.run(None, feeds) if y.dtype == np.float32]


_TEXT = """# Model coverage

Every classification, segmentation and detection network of torchvision below 150 million
parameters, and networks of other shapes, taken through `quantize(model, example_inputs=...)`,
`calibrate`, `export_onnx`, ONNX Runtime with optimizations off, `lint_onnx`, and ten steps of
fine-tuning in train mode. Weights are random; batch norms have the statistics of random images.

**{passed} of {count} pass.** {today}, torch {torch}, torchvision {torchvision}, ONNX Runtime
{onnxruntime}, CPU; `python tools/model_coverage.py`.

*difference*: largest difference between the outputs of the file and of the fake-quantized model,
over the largest output, the median of {batches} batches. *moved*: the same between that model and
itself when its input moves by 1e-6, the largest of {moves} moves of each batch. Deep random
networks amplify one code that rounding moved into another output, so that only some batches differ
at all. A network passes where the difference is at most {factor} times what a move makes, where the
file has no finding of severity error or performance, and where the model trains. The other columns
count quantizers by what they are for; *float* is what could be quantized and is left float by the
rules for TensorRT.

{table}

Left out:

{left}

Detectors run from the image to the outputs of their heads, before boxes are decoded; the second
stage of a two-stage detector sees regions of a fixed grid, because which regions the first stage
proposes is decided by code that no runtime quantizes.
"""


def _page(rows: list[Row], left: list[tuple[str, str]]) -> str:
    """The table as Markdown."""
    kinds = [k for k, _ in Counter(k for row in rows for k in row.quantizers).most_common()]
    table = [
        f"| network | {' | '.join(kinds)} | float | difference | moved | |",
        "|---" * (len(kinds) + 5) + "|",
    ]
    for row in rows:
        counts = " | ".join(str(row.quantizers.get(kind, "")) for kind in kinds)
        outcome = row.problem.replace("|", "/") or "pass"
        table.append(
            f"| {row.name} | {counts} | {row.left or ''} | {row.difference:.1e} | "
            f"{row.moved:.1e} | {outcome} |"
        )
    return _TEXT.format(
        passed=sum(not row.problem for row in rows),
        count=len(rows),
        today=date.today(),
        torch=torch.__version__.split("+")[0],
        torchvision=torchvision.__version__.split("+")[0],
        onnxruntime=onnxruntime.__version__,
        batches=BATCHES,
        moves=MOVES,
        factor=FACTOR,
        table="\n".join(table),
        left="\n".join(f"- {name}: {reason}" for name, reason in left),
    )


def main() -> int:
    """Run what was asked for; 1 if a network does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="names or patterns; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument("--page", action="store_true", help="write the page of what has been run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    entries, left = torchvision_entries()
    entries = own_entries() + entries
    if options.names:
        entries = [e for e in entries if any(fnmatch.fnmatch(e.name, n) for n in options.names)]
    done: dict[str, Row] = {}
    if (options.resume or options.page) and RESULTS.exists():
        done = {r["name"]: Row(**r) for r in json.loads(RESULTS.read_text()) if not r["problem"]}
    waiting = [entry for entry in entries if entry.name not in done and not options.page]
    waiting.sort(key=lambda entry: entry.size)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context) as pool:
        running = [pool.submit(_cover_by_name, entry.name) for entry in waiting]
        for ended in tqdm(as_completed(running), desc="networks", total=len(running)):
            row = ended.result()
            done[row.name] = row
            print(f"{row.name:40} {row.seconds:6.1f} s  {row.problem or 'pass'}", flush=True)
            if not options.names:
                RESULTS.write_text(json.dumps([asdict(r) for r in done.values()], indent=1))
    left += [(entry.name, "not run") for entry in entries if entry.name not in done]
    rows = [done[entry.name] for entry in entries if entry.name in done]
    if not options.names:
        PAGE.write_text(_page(rows, left))
    return any(row.problem for row in rows)


if __name__ == "__main__":
    sys.exit(main())
