import numpy as np
import pytest
import torch

from pytorch_quant.calib import counting
from pytorch_quant.calib.counting import count_rows


def expected(x, bins, exponent):
    index = np.floor(np.abs(x.double().numpy()) * bins / 2.0**exponent).astype(int)
    return np.bincount(index, minlength=bins).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bins", [2048, 100])
def test_blocks_count_what_numpy_counts(dtype, bins):
    x = (torch.randn(5 * counting._BLOCK + 3) * 2).to(dtype)
    assert count_rows(x[None], bins, torch.tensor([4]))[0].tolist() == expected(x, bins, 4)


def test_the_range_grows_from_block_to_block(monkeypatch):
    monkeypatch.setattr(counting, "_BLOCK", 64)
    counting._lane_offsets.cache_clear()
    x = torch.randn(1000) * torch.logspace(-3, 4, 1000)
    x[:70] = 0
    found = counting.range_and_counts(x, 256)
    counting._lane_offsets.cache_clear()
    assert (found.low, found.high) == (float(x.min()), float(x.max()))
    assert 2.0 ** (found.exponent - 1) <= float(x.abs().max()) < 2.0**found.exponent
    assert found.counts.tolist() == expected(x, 256, found.exponent)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_bad_values_are_seen_wherever_they_are(bad, place, monkeypatch):
    monkeypatch.setattr(counting, "_BLOCK", 64)
    counting._lane_offsets.cache_clear()
    x = torch.randn(1000)
    x[place] = bad
    found = counting.range_and_counts(x, 256)
    counting._lane_offsets.cache_clear()
    assert found.counts is None
    assert not np.isfinite(max(found.high, -found.low))
