"""Two processes calibrate as one would on all batches; what they do is in distributed_programs."""

from pathlib import Path

import distributed_programs as programs
import numpy as np
import pytest
import torch
from two_processes import run_two

pytestmark = pytest.mark.slow
PROGRAM = Path(programs.__file__)
SECONDS = 150


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of both processes, by program."""
    folder = tmp_path_factory.mktemp("ranks")

    def paths(rank: int) -> list[Path]:
        return [folder / "rendezvous", folder / f"result{rank}", folder]

    return run_two(PROGRAM, paths, folder, SECONDS)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys() and len(got) > 1
    for name, amax in got.items():
        assert amax.shape == wanted[name].shape, name
        assert torch.equal(amax, wanted[name]), f"{name}: {amax} instead of {wanted[name]}"


@pytest.mark.parametrize("method", programs.METHODS)
def test_the_amax_is_that_of_one_process_on_all_batches(results, method):
    first, second = (result["methods"][method] for result in results)
    for found in (first, second):
        assert_same(found["amax"], first["amax"])
        if method == "mean_max":
            for name, amax in found["amax"].items():
                np.testing.assert_allclose(amax, found["wanted"][name], rtol=1e-6)
        else:
            assert_same(found["amax"], found["wanted"])
        assert_same(found["reported"], found["amax"])
        assert found["batches"] == 5
        assert found["seen"] == 5 * 5 * 36
        assert found["shown"] == first["shown"]


def test_the_largest_magnitude_of_all_batches_is_what_numpy_finds(results):
    largest = np.abs(torch.cat(programs.images()).numpy()).max()
    for result in results:
        assert result["methods"]["max"]["amax"]["0._input_quantizer"].item() == largest
        assert result["methods"]["max"]["amax"]["3._input_quantizer"].shape == (1, 4, 1, 1)


def test_every_process_answers_other_methods_by_itself(results):
    for got, wanted in results[1]["other_methods_later"]:
        assert_same(got, wanted)


def test_a_process_without_batches(results):
    for result in results:
        found, wanted = result["a_rank_without_batches"]
        for amax, batches in found:
            assert_same(amax, wanted)
            assert batches == 5


def test_no_batches_anywhere_is_an_error_everywhere_and_changes_nothing(results):
    for result in results:
        error, held, after = result["no_batches_anywhere"]
        assert "ValueError: no batches to calibrate on" in error
        assert_same(after, held)


def test_accumulating_counts_each_batch_once(results):
    for result in results:
        got, seen, loaded, local, wanted = result["accumulate"]
        assert_same(got, wanted)
        assert_same(loaded, wanted)
        assert_same(local, wanted)
        assert seen["0._input_quantizer"] == 5 * 5 * 36


def test_accumulating_forgets_the_choice_of_best_everywhere(results):
    for result in results:
        before, after = result["accumulate_after_best"]
        assert all(before.values()) and not any(after.values())


@pytest.mark.parametrize("method", ["mse", "mean_max"])
def test_what_one_process_adds_alone_counts_once(results, method):
    for result in results:
        got, seen, wanted = result["accumulate_alone"][method]
        assert seen["0._input_quantizer"] == 5 * 5 * 36
        for name, amax in got.items():
            np.testing.assert_allclose(amax, wanted[name], rtol=1e-6 * (method == "mean_max"))


def test_an_error_of_one_process_reaches_the_other(results):
    first, second = (result["a_failing_rank"] for result in results)
    assert "RuntimeError" in first[0] and "rank 1: Broken: the disk is full" in first[0]
    assert second[0] == "Broken: the disk is full"
    # The second process has seen the batch before its error; nothing was combined.
    for (_, kept, after, wanted), own in ((first, images(0, 3)), (second, images(3, 4))):
        assert kept == own.abs().max().item()
        assert_same(after, wanted)


def images(start, stop):
    return torch.cat(programs.images()[start:stop])


@pytest.mark.parametrize("program", ["nan_on_one_rank", "nan_at_the_end"])
def test_nan_on_one_process_names_the_quantizer_and_the_rank(results, program):
    first, second = (result[program] for result in results)
    assert "RuntimeError" in first and "rank 1: CalibrationError" in first
    assert "0._input_quantizer: NaN or Inf" in first
    assert "0._input_quantizer: NaN or Inf" in second and second.startswith("CalibrationError")
    assert "batch 1" in second


def test_processes_that_differ_are_told_so_before_any_batch(results):
    for result in results:
        method, _, axis, name, shape = result["wrong_on_one_rank"]
        assert "calibrate(method=) differs between processes: rank 0 has lp" in method
        assert "3._input_quantizer differs between processes" in axis and "rank 1 has" in axis
        assert "5._input_quantizer differs between processes" in name
        assert "rank 1 has nothing of that name" in name
        assert "0._input_quantizer: largest is float32 of shape (2, 1) on rank 0" in shape
        assert "(3, 1) on rank 1" in shape
    assert "rank 1: ValueError: unknown method 'msee'" in results[0]["wrong_on_one_rank"][1]
    assert "ValueError: unknown method 'msee'" in results[1]["wrong_on_one_rank"][1]


def test_calibrators_of_the_user(results):
    for result in results:
        refused, found = result["own_calibrators"]
        assert "5._input_quantizer: the statistics of Least cannot be combined" in refused
        # 4 * (3 + 4) + 4, twice that sum when they accumulate, afresh, and after one alone; then
        # 4 * (3 + 4) more for a batch of each alone and the same for another one together.
        assert found == [32.0, 60.0, 32.0, 60.0, 116.0]


def test_one_process_alone(results):
    assert results[1]["without_sync"] == images(0, 2).abs().max().item()


def test_unlike_machines_take_the_amax_of_the_first(results):
    first, second = (result["unlike_machines"] for result in results)
    for inputs, reported in (first, second):
        assert_same(inputs, first[0])
        assert_same(reported, first[0])


def test_one_progress_bar(results):
    first, second = (result["progress"] for result in results)
    assert "calibrate (best)" in first and "best of methods" in first
    assert second == ""


def test_data_parallel_with_uneven_batches(results):
    for result in results:
        found, wanted = result["data_parallel"]
        assert_same(found["uneven"], wanted)
        assert_same(found["none"], wanted)
        assert found["buffers"] and found["trains"]
        assert all(name.startswith("module.") for name in found["names"])


@pytest.mark.parametrize("case", ["uneven", "none", "none on the first", "best"])
def test_sharded_models_with_uneven_batches(results, case):
    for result in results:
        got, wanted, batches = result["fsdp"][case]
        assert_same(got, wanted)
        assert batches == 5


def test_a_sharded_model_quantizes_and_ranges_again(results):
    for result in results:
        got, wanted = result["fsdp"]["outputs"]
        assert torch.equal(got, wanted)
        assert_same(*result["fsdp"]["later"])
        assert "ValueError" in result["fsdp"]["alone"] and "sync=True" in result["fsdp"]["alone"]


def test_a_sharded_model_survives_bad_batches_and_loaders(results):
    first, second = (result["fsdp_failures"] for result in results)
    assert "RuntimeError" in first[0][0] and "rank 1: CalibrationError" in first[0][0]
    assert "calibration batch 1: 0._input_quantizer: NaN or Inf" in second[0][0]
    assert "rank 1: Broken" in first[0][1] and second[0][1] == "Broken: the disk is full"
    # The bad batch is the second of its process; the other has run two of its own by then.
    assert first[1] == images(0, 2).abs().max().item()
    assert second[1] == images(3, 4).abs().max().item()
    for _, _, after, wanted in (first, second):
        assert_same(after, wanted)


def test_an_interrupt_stops_one_process_and_loses_nothing(results):
    first, second = (result["an_interrupt_of_one_rank"] for result in results)
    assert second[0] == "KeyboardInterrupt"
    assert "RuntimeError: another process has left the calibration" in first[0]
    assert_same(first[1], first[2])
