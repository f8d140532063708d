"""Two processes with different batches get the same weights and biases."""

from pathlib import Path

import improve_programs as programs
import pytest
import torch
from two_processes import run_two

pytestmark = pytest.mark.slow
PROGRAM = Path(programs.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_two(PROGRAM, lambda rank: [folder], folder, 120)


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
