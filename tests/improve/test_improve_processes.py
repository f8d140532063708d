"""Two processes with different batches get the same weights and biases."""

import os
import subprocess
import sys
from pathlib import Path

import improve_programs as programs
import pytest
import torch

PROGRAM = Path(programs.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    places = (str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH"))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
    }
    logs = [folder / f"log{rank}" for rank in range(2)]
    running = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(PROGRAM), str(rank), str(folder)]
            with log.open("w") as out:
                running.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
        codes = [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    return [torch.load(folder / f"result{rank}") for rank in range(2)]


CASES = ["smooth", "adaround", "bias", "smooth_quant without batches"]


@pytest.mark.parametrize("case", [*CASES, "bias_correction without batches"])
def test_both_processes_hold_the_same_bits(results, case):
    (first, told), (second, told_too) = (result[case] for result in results)
    assert first.keys() == second.keys() and told == told_too
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_outliers_of_either_process_are_smoothed(results):
    scale = results[0]["smooth"][0]["0._input_quantizer._pre_quant_scale"].flatten()
    assert set(scale.argsort()[:2].tolist()) == {2, 3}


def test_an_error_of_one_process_reaches_the_other(results):
    assert "rank 1: TypeError" in results[0]["error"]
    assert results[1]["error"].startswith("TypeError: bias_correction: batches is None")
