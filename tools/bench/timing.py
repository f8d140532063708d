"""What benchmarks share: interleaved rounds, quartiles, the machine in words, a table.

    cases = [Case("float", run_float), Case("quantized", run_quantized, prepare)]
    times = interleaved(cases, rounds=7)
    spread = quartiles(ratios(times["quantized"], times["float"]))
    rows = [bounded("quantized against float", spread.median, 1.15, f"{spread:.3f}")]
    print(report("Speed", rows, command, device))
    raise SystemExit(status(rows))

A machine that others use is slow for seconds at a time. So the cases take turns, and ratios are
formed within a round, where they met the same machine.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        name: Its key in the result of `interleaved`.
        run: What is timed.
        prepare: Runs before every timing, untimed.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


class Seconds(NamedTuple):
    """The time of one run.

    Attributes:
        queued: Until the call returned: the work of the host.
        done: Until the device was done too. On the CPU the same.
    """

    queued: float
    done: float


class Quartiles(NamedTuple):
    """The middle half of some numbers. Formats as `median (low to high)`."""

    low: float
    median: float
    high: float

    def __format__(self, spec: str) -> str:
        low, median, high = (format(value, spec) for value in self)
        return f"{median} ({low} to {high})"


class Row(NamedTuple):
    """One line of the table; `holds` is None where nothing is claimed."""

    what: str
    measured: str
    bound: str = "none"
    holds: bool | None = None


def interleaved(
    cases: Sequence[Case],
    rounds: int,
    *,
    device: torch.device | str = "cpu",
    least_seconds: float = 0.2,
    title: str = "",
) -> dict[str, list[Seconds]]:
    """Measure the cases in turns: A B C, A B C, ...

    One round before them warms up and is dropped. Short runs are repeated, all equally often.

    Args:
        cases: With different names.
        rounds: How often each is measured.
        device: Where the work is done; waited for before and after each timing.
        least_seconds: What a timing of the first case shall last.
        title: For the progress bar.

    Returns:
        The time of one run in every round, by the name of the case.
    """
    for case in cases:
        _timed(case, 1, device)
    runs = max(1, math.ceil(least_seconds / _timed(cases[0], 1, device).done))
    times: dict[str, list[Seconds]] = {case.name: [] for case in cases}
    with tqdm(total=rounds * len(cases), desc=title, leave=False) as bar:
        for _ in range(rounds):
            for case in cases:
                times[case.name].append(_timed(case, runs, device))
                bar.update()
    return times


def ratios(times: Sequence[Seconds], base: Sequence[Seconds], what: str = "done") -> list[float]:
    """The ratio of two cases in every round; `what` is a field of `Seconds`."""
    return [getattr(t, what) / getattr(b, what) for t, b in zip(times, base, strict=True)]


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of one number or more."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def bounded(what: str, value: float, limit: float, measured: str, *, least: bool = False) -> Row:
    """A row that claims `value <= limit`, or `value >= limit` with `least`."""
    bound = f"{'at least' if least else 'at most'} {limit:g}"
    return Row(what, measured, bound, value >= limit if least else value <= limit)


def machine(device: torch.device | str = "cpu") -> str:
    """Processor, cores, threads that torch uses, torch's version, and the GPU where it is used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [_processor(), f"{cores} core(s)", f"{torch.get_num_threads()} thread(s)"]
    words.append(f"torch {torch.__version__}")
    if torch.device(device).type == "cuda":
        words.append(torch.cuda.get_device_name(device))
    return ", ".join(words)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    claims = {None: "", True: "yes", False: "**no**"}
    lines = ["| what | measured | bound | holds |", "|---|---|---|---|"]
    lines += [f"| {r.what} | {r.measured} | {r.bound} | {claims[r.holds]} |" for r in rows]
    return "\n".join(lines)


def report(
    title: str, rows: Sequence[Row], command: str, device: torch.device | str = "cpu"
) -> str:
    """A Markdown section: the title, then date, machine and command, then the table."""
    date = datetime.date.today().isoformat()
    return f"## {title}\n\n{date}; {machine(device)}; `{command}`\n\n{table(rows)}"


def status(rows: Sequence[Row]) -> int:
    """The exit status: 1 if a bound does not hold, else 0."""
    return int(any(row.holds is False for row in rows))


def _timed(case: Case, runs: int, device: torch.device | str) -> Seconds:
    case.prepare()
    _wait_for(device)
    begin = time.perf_counter()
    for _ in range(runs):
        case.run()
    queued = time.perf_counter()
    _wait_for(device)
    done = time.perf_counter()
    return Seconds((queued - begin) / runs, (done - begin) / runs)


def _wait_for(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    # platform.processor() is empty, or no more than the architecture, on many a Linux.
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
