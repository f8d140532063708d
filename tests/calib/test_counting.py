import numpy as np
import pytest
import torch

from pytorch_quant.calib import counting
from pytorch_quant.calib.counting import count_rows, counting_threads


def expected(x, bins, exponent):
    index = np.floor(np.abs(x.double().numpy()) * bins / 2.0**exponent).astype(int)
    return np.bincount(index, minlength=bins).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bins", [2048, 100])
def test_threads_count_the_same(dtype, bins, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = (torch.randn(5 * counting._BLOCK + 3) * 2).to(dtype)
    alone = count_rows(x[None], bins, torch.tensor([4]))
    with counting_threads():
        assert counting._threads is not None
        together = count_rows(x[None], bins, torch.tensor([4]))
    assert torch.equal(alone, together)
    assert together[0].tolist() == expected(x, bins, 4)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_range_grows_from_block_to_block(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(counting, "_BLOCK", 64)
    counting._lane_offsets.cache_clear()
    x = torch.randn(1000) * torch.logspace(-3, 4, 1000)
    x[:70] = 0
    with counting_threads():
        found = counting.range_and_counts(x, 256)
    counting._lane_offsets.cache_clear()
    assert (found.low, found.high) == (float(x.min()), float(x.max()))
    assert 2.0 ** (found.exponent - 1) <= float(x.abs().max()) < 2.0**found.exponent
    assert found.counts.tolist() == expected(x, 256, found.exponent)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_bad_values_are_seen_wherever_they_are(threads, bad, place, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(counting, "_BLOCK", 64)
    counting._lane_offsets.cache_clear()
    x = torch.randn(1000)
    x[place] = bad
    with counting_threads():
        found = counting.range_and_counts(x, 256)
    counting._lane_offsets.cache_clear()
    assert found.counts is None
    assert not np.isfinite(max(found.high, -found.low))


def test_threads_leave_torch_as_it_was():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), counting_threads(), counting_threads():
        raise KeyError
    assert counting._threads is None
    assert torch.get_num_threads() == before
    with torch.no_grad(), counting_threads():
        assert not torch.is_grad_enabled()


def test_gradients_and_inference_mode_reach_the_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.randn(3 * counting._BLOCK, requires_grad=True)
    with torch.inference_mode():
        y = torch.randn(3 * counting._BLOCK)
    for values in (x, y):
        with counting_threads(), torch.no_grad():
            counts = count_rows(values[None], 64, torch.tensor([4]))
        assert int(counts.sum()) == values.numel()
        assert not counts.is_inference()
