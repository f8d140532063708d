"""The calibration benchmark in its quick form, and the yardstick that it measures against."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pytorch_quant.calib import search
from pytorch_quant.formats import make_format

BENCH = Path(__file__).parents[2] / "tools" / "bench"
BINS = 512


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def timing():
    return load("timing")


@pytest.fixture(scope="module")
def old_search():
    return load("old_search")


def run(*arguments):
    command = [sys.executable, str(BENCH / "calibration.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_quick_run_prints_the_table():
    done = run("--quick", "--batch-size", "2")
    assert done.returncode in (0, 1), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "## Calibration"
    assert "`python tools/bench/calibration.py --quick --batch-size 2`" in lines[2]
    assert f"torch {torch.__version__}" in lines[2]
    assert lines[4] == "| what | measured | bound | holds |"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[6:]]
    assert len(cells) == 7 and all(len(row) == 4 for row in cells)
    failed = [row[0] for row in cells if row[3] == "**no**"]
    assert done.returncode == int(bool(failed))
    # The only claim that does not depend on the speed or the memory of the machine.
    difference = next(row for row in cells if "difference" in row[0])
    assert difference[3] == "yes", difference


def test_bad_arguments_are_refused(bench, capsys):
    with pytest.raises(SystemExit) as stopped:
        load("calibration").main(["--rounds", "0"])
    assert stopped.value.code == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err


def histogram(seed):
    # Half of them zeros, as behind a ReLU.
    x = np.random.default_rng(seed).laplace(size=200_000).clip(min=0)
    counts, edges = np.histogram(x, bins=BINS, range=(0, x.max()))
    return counts.astype(np.float64), float(edges[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["entropy", "mse", "percentile"])
def test_classical_search_agrees(old_search, method, seed):
    counts, width = histogram(seed)
    rows = torch.from_numpy(counts)[None], torch.tensor([width])
    if method == "percentile":
        found = search.percentile_amax(*rows, 99.9)
        expected = old_search.percentile_amax(counts, width, 99.9)
    else:
        found = getattr(search, f"{method}_amax")(*rows, make_format(8))
        expected = old_search.SEARCHES[method](counts, width)
    assert 128 <= expected / width <= BINS
    assert float(found) / width == pytest.approx(expected / width, abs=1.01)


def test_cases_take_turns(timing):
    order = []
    cases = [
        timing.Case(name, lambda name=name: order.append(name), lambda: order.append("prepare"))
        for name in "ab"
    ]
    times = timing.interleaved(cases, 3, least_seconds=0.0)
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert order[-12:] == ["prepare", "a", "prepare", "b"] * 3
    assert all(0 <= t.queued <= t.done for t in times["a"])


def test_short_runs_are_repeated(timing):
    runs = []
    timing.interleaved([timing.Case("a", lambda: runs.append(1))], 1, least_seconds=1e-3)
    assert len(runs) > 10


def test_ratios_are_formed_within_a_round(timing):
    fast = [timing.Seconds(1.0, 2.0), timing.Seconds(10.0, 20.0)]
    slow = [timing.Seconds(3.0, 3.0), timing.Seconds(30.0, 30.0)]
    assert timing.ratios(slow, fast) == [1.5, 1.5]
    assert timing.ratios(slow, fast, "queued") == [3.0, 3.0]


def test_quartiles(timing):
    assert timing.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert f"{timing.quartiles([2.0]):.1f}" == "2.0 (2.0 to 2.0)"


def test_status_and_table(timing):
    held = timing.bounded("a", 1.0, 1.0, "1 s")
    missed = timing.bounded("b", 99.0, 100.0, "99 times", least=True)
    free = timing.Row("c", "5 ms")
    assert timing.status([held, free]) == 0
    assert timing.status([held, missed]) == 1
    assert timing.table([held, missed, free]).splitlines()[2:] == [
        "| a | 1 s | at most 1 | yes |",
        "| b | 99 times | at least 100 | **no** |",
        "| c | 5 ms | none |  |",
    ]
