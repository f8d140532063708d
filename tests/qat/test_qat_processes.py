"""Two processes train as one on the joined batch; what they do is in qat_programs."""

from pathlib import Path

import pytest
import qat_programs as programs
import torch
from two_processes import run_two

pytestmark = pytest.mark.slow
PROGRAM = Path(programs.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat")
    return run_two(PROGRAM, lambda rank: [folder / "meet", folder / f"result{rank}"], folder, 120)


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if value.is_floating_point():
            assert value.shape == wanted[name].shape, name
            assert (value - wanted[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("kind", ["frozen", "lsq", "pact", "moving"])
def test_data_parallel_training_is_that_of_one_process(results, kind):
    for result in results:
        assert_close(*result["data_parallel"][kind])
    first, second = (result["data_parallel"][kind][0] for result in results)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    started = programs.network().state_dict()
    assert not torch.equal(first["0.weight"], started["0.weight"])
    moved = not torch.equal(first["0._input_quantizer._amax"], started["0._input_quantizer._amax"])
    assert moved == (kind != "frozen")


def test_a_schedule_freezes_learned_ranges_in_data_parallel(results):
    for result in results:
        seen = [step["0._input_quantizer"].item() for step in result["schedules"]]
        assert seen[0] != seen[1] == seen[2] == seen[3]
    assert results[0]["schedules"][3].keys() == results[1]["schedules"][3].keys()


def test_what_cannot_be_done_to_a_wrapped_model(results):
    for result in results:
        freeze, learn, teacher, shard = result["errors"]
        assert "find_unused_parameters=True" in freeze
        assert "that DistributedDataParallel would not know of" in learn
        assert "DistributedDataParallel; make it before" in teacher
        assert "that fully_shard would not know of" in shard


@pytest.mark.parametrize("kind", ["frozen", "lsq"])
def test_sharded_training_is_that_of_one_process(results, kind):
    for result in results:
        found, wanted, same, shown, doubled = result["sharded"][kind]
        assert_close(found, wanted)
        assert same and doubled
        assert ("amax=sharded" in shown) == (kind == "lsq")
