"""The benchmarks of fake quantization, inference and training in their quick form."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"
TITLES = {
    "fake_quant": "## Fake quantization",
    "inference_overhead": "## Inference",
    "qat_step": "## Training",
    "qat_memory": "## Memory of training",
}


def run(name, *arguments):
    command = [sys.executable, str(BENCH / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TITLES)
def test_quick_run_prints_the_table_and_writes_json(name, tmp_path):
    target = tmp_path / "rows.json"
    done = run(name, "--quick", "--json", str(target))
    assert done.returncode in (0, 1), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == TITLES[name]
    assert f"`python tools/bench/{name}.py --quick --json" in lines[2]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[6:]]
    written = json.loads(target.read_text())
    assert [row["what"] for row in written["rows"]] == [row[0] for row in cells]
    claimed = [row for row in written["rows"] if row["holds"] is not None]
    assert claimed and all("pytorch_quant" in row["what"] for row in claimed)
    assert done.returncode == int(any(not row["holds"] for row in claimed))
    # The peer that is always there.
    assert name != "fake_quant" or any("torch fake_quantize" in row[0] for row in cells)


def test_bad_arguments_are_refused(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qat_step.py", "--batch-size", "0"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(bench / "qat_step.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert "--batch-size must be at least 1" in capsys.readouterr().err
