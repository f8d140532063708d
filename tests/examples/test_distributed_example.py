"""The example of distributed calibration, on two processes and on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "distributed_calibration.py"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "processes"), [(TORCHRUN, 2), ([], 1)])
def test_the_example(launcher, processes):
    # No GPU: two processes may not share one.
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    places = (str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), "--method", "entropy", "--smoke"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Gloo of torch 2.8 prints its connections there.
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert lines[0].split() == ["quantizer", "method", "amax", "values", "clipped"]
    # Fewer than all images, the last batch smaller than the others.
    assert lines[-3].startswith("5 batches on") and lines[-3].endswith(
        f"batches on {processes} process(es), method entropy"
    )
    assert lines[-2:] == ["equal on all processes: True", "equal to one process:   True"]
    # One process prints.
    assert sum(line.startswith("quantizer") for line in lines) == 1
