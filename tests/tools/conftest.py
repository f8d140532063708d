"""The benchmarks, imported into the process of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The folder of the benchmarks, which import each other by plain names, as when they run."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield BENCH
    for path in BENCH.glob("*.py"):
        sys.modules.pop(path.stem, None)
