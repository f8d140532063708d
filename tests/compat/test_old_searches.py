"""`calib.histogram._compute_amax_*`, with the histograms that existing programs give them."""

import numpy as np
import pytest
import reference
import torch


@pytest.fixture
def searches(old):
    from pytorch_quantization.calib import histogram

    return histogram


def histogram_of(x, bins=512):
    # The range ends at the maximum, as in the old package; that is no power of two.
    return np.histogram(np.abs(x), bins=bins, range=(0, np.abs(x).max()))


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal(200_000).astype(np.float32) * 3


FORMS = pytest.mark.parametrize("form", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])


@FORMS
def test_percentile(searches, x, form):
    counts, edges = map(form, histogram_of(x))
    for percentile in (100, 99.9, 50):
        amax = searches._compute_amax_percentile(counts, edges, percentile)
        assert amax.shape == ()
        # One bin width.
        assert abs(float(amax) - np.percentile(np.abs(x), percentile)) <= float(edges[1])
    with pytest.raises(ValueError, match="range"):
        searches._compute_amax_percentile(counts, edges, 101)


@FORMS
@pytest.mark.parametrize("unsigned", [False, True])
def test_mse(searches, x, form, unsigned):
    x = np.abs(x) if unsigned else x
    counts, edges = histogram_of(x)
    before = counts.copy()
    amax = searches._compute_amax_mse(form(counts), form(edges), 4, unsigned, 1, 32)
    centres = (edges[1:] + edges[:-1]) / 2

    def error(amax):
        y = reference.fake_quant(centres, np.float32(amax), 4, unsigned=unsigned)
        return float((counts * (y - centres) ** 2).sum())

    best = min(map(error, edges[32:]))
    assert error(amax) <= best * 1.001
    np.testing.assert_array_equal(counts, before)


@FORMS
def test_entropy(searches, x, form):
    counts, edges = histogram_of(np.concatenate([x, [60.0]]), 2048)
    before = counts.copy()
    found = [searches._compute_amax_entropy(form(counts), form(edges), 8, False) for _ in range(2)]
    # The outlier is clipped, the bell is not; and a second call says the same.
    assert found[0] == found[1]
    assert 6 < found[0] < 20
    np.testing.assert_array_equal(counts, before)
    by_name = searches._compute_amax_entropy(
        form(counts), form(edges), num_bits=8, unsigned=False, stride=4, start_bin=128
    )
    assert 6 < by_name < 20


def test_rows_and_nothing(searches, x):
    counts, edges = histogram_of(x)
    two = searches._compute_amax_percentile(np.stack([counts, counts]), edges, 99.0)
    one = searches._compute_amax_percentile(counts, edges, 99.0)
    assert two.tolist() == [float(one)] * 2
    assert searches._compute_amax_mse(None, None, 8, False) is None
    with pytest.raises(ValueError, match="512 bins have 513 edges, got 512"):
        searches._compute_amax_mse(counts, edges[:-1], 8, False)
