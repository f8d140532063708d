"""The latency of files side by side, in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pytorch_quant.export.engines import open_session
from pytorch_quant.export.ports import Port, read_onnx
from pytorch_quant.export.saving import external_files
from pytorch_quant.export.session import Session
from pytorch_quant.tables import aligned


@dataclass(frozen=True)
class LatencyRow:
    """The latency of one file.

    Attributes:
        path: The file.
        median: ms.
        lower: The first quartile, ms.
        upper: The third quartile, ms.
        speedup: The median of the first file divided by this one.
        size: Bytes of the file and its external data.
    """

    path: str
    median: float
    lower: float
    upper: float
    speedup: float
    size: int


@dataclass(frozen=True)
class LatencyReport:
    """Files that ran in turns.

    Attributes:
        engine: Where.
        threads: How many the engine used.
        rounds: Number of timed runs of each file.
        shapes: Shapes of the inputs by name.
        rows: One for each file, in the order given.
    """

    engine: str
    threads: int
    rounds: int
    shapes: dict[str, list[int]]
    rows: list[LatencyRow]

    def to_json(self) -> dict[str, Any]:
        """As a dict that `json.dumps` takes."""
        return asdict(self)

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in self.shapes.items())
        table = [("file", "median ms", "quartiles", "speedup", "MB")]
        for row in self.rows:
            quartiles = f"{row.lower:.3f}-{row.upper:.3f}"
            numbers = (f"{row.median:.3f}", quartiles, f"{row.speedup:.2f}x")
            table.append((row.path, *numbers, f"{row.size / 1e6:.2f}"))
        head = f"{self.engine}, {self.threads} thread(s), {self.rounds} rounds in turns, {shapes}"
        return "\n".join([head, *aligned(table, right=4)])


def compare_latency(
    paths: Sequence[str | os.PathLike[str]],
    *,
    engine: str = "onnxruntime",
    threads: int | None = None,
    rounds: int = 50,
    warmup: int = 5,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: bool = True,
) -> LatencyReport:
    """Time ONNX files in turns, so that whatever else the machine does hits all of them.

    Args:
        paths: The files, two or more to compare; they need not have the same inputs.
        engine: One of `engines.ENGINES`.
        threads: How many the engine uses; by default as many as torch.
        rounds: Number of timed runs of each file.
        warmup: Number of runs before them.
        shapes: Shapes of inputs by name; dimensions that vary are 1 where this says nothing.
        progress: Show a progress bar when it takes over a second.

    Raises:
        ImportError: the engine is not installed.
        OSError: a file or its external data is missing.
        RuntimeError: the engine cannot run a file.
        ValueError: no paths; no ONNX file; a name in `shapes` that no file has; a shape that a file
            does not take; an input of unknown rank that `shapes` does not name.
    """
    if not paths or isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"paths is a list of one or more files, got {paths!r}")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be >= 1 and warmup >= 0, got {rounds} and {warmup}")
    threads = torch.get_num_threads() if threads is None else threads
    sessions = [open_session(path, engine, threads=threads) for path in paths]
    known = {port.name for session in sessions for port in session.inputs}
    unknown = set(shapes or ()) - known
    if unknown:
        raise ValueError(
            f"shapes names {', '.join(sorted(unknown))}, and the inputs are "
            f"{', '.join(sorted(known))}"
        )
    batches = [[_input(port, shapes or {}) for port in session.inputs] for session in sessions]
    times = _in_turns(sessions, batches, rounds, warmup, progress)
    rows: list[LatencyRow] = []
    for path, taken in zip(paths, times, strict=True):
        lower, median, upper = (float(t) for t in np.percentile(taken, (25, 50, 75)))
        first = rows[0].median if rows else median
        rows.append(LatencyRow(str(path), median, lower, upper, first / median, _size(path)))
    used = {
        port.name: list(tensor.shape)
        for session, batch in zip(sessions, batches, strict=True)
        for port, tensor in zip(session.inputs, batch, strict=True)
    }
    return LatencyReport(engine, threads, rounds, used, rows)


def _in_turns(
    sessions: list[Session],
    batches: list[list[Tensor]],
    rounds: int,
    warmup: int,
    progress: bool,
) -> list[list[float]]:
    """Milliseconds of each run of each session."""
    times: list[list[float]] = [[] for _ in sessions]
    turns = range(warmup + rounds)
    for turn in tqdm(turns, desc="latency", delay=1.0, leave=False, disable=not progress):
        for session, batch, taken in zip(sessions, batches, times, strict=True):
            started = time.perf_counter()
            session.run(batch)
            if turn >= warmup:
                taken.append(1e3 * (time.perf_counter() - started))
    return times


def _input(port: Port, shapes: Mapping[str, Sequence[int]]) -> Tensor:
    """Values that keep every operator busy: normal, or zeros for integers, which may be indices."""
    shape = shapes.get(port.name)
    if shape is None:
        if port.shape is None:
            raise ValueError(f"the file does not say the rank of {port.name!r}; give it in shapes")
        shape = [1 if size is None else size for size in port.shape]
    if port.dtype is None:
        raise ValueError(f"input {port.name!r} has a type that torch does not have")
    if not port.dtype.is_floating_point:
        return torch.zeros(tuple(shape), dtype=port.dtype)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tuple(shape), generator=generator).to(port.dtype)


def _size(path: str | os.PathLike[str]) -> int:
    file = Path(path)
    data = external_files(read_onnx(file, data=False))
    return file.stat().st_size + sum((file.parent / name).stat().st_size for name in data)
