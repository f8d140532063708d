from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytorch_quant.calib import Histogram, entropy_amax, lp_amax, mse_amax, percentile_amax
from pytorch_quant.fake_quant import fake_quantize
from pytorch_quant.formats import FloatFormat, IntFormat

INT8, UINT8, INT4 = IntFormat(8), IntFormat(8, signed=False), IntFormat(4)
E4M3, E2M1 = FloatFormat(4, 3), FloatFormat(2, 1)
FORMATS = [
    IntFormat(2), INT4, IntFormat(4, signed=False), IntFormat(6), INT8, UINT8, IntFormat(10),
    IntFormat(16), E4M3, E2M1,
]  # fmt: skip


def last_bin(h):
    return int(np.flatnonzero(h)[-1]) + 1 if h.any() else 0


def candidates(h, start, stride):
    last = last_bin(h)
    regular = list(range(start, last + 1, stride))
    return regular if last in regular else [*regular, last]


def largest_minimum(ends, objective):
    least = min(objective)
    near = [i for i, o in zip(ends, objective, strict=True) if o <= least + 1e-9 * least + 1e-12]
    return max(near)


def reference_mse(h, fmt, start=128, stride=1, p=2):
    """The best number of bins: every centre goes to the nearest value, whatever its distance."""
    if not h.any():
        return 0
    centres = np.arange(len(h)) + 0.5
    ends = candidates(h, start, stride)
    errors = []
    for i in ends:
        values = fmt.magnitudes() * i / fmt.bound
        nearest = np.searchsorted((values[1:] + values[:-1]) / 2, centres)
        errors.append(float((h * np.abs(centres - values[nearest]) ** p).sum()))
    return largest_minimum(ends, errors)


@cache
def segments_of(i, fmt):
    """The segment of each of the first `i` bins."""
    levels = len(fmt.magnitudes())
    if isinstance(fmt, IntFormat):
        # Bin j lies in segment l if l * i / L <= j < (l + 1) * i / L.
        return [j * levels // i for j in range(i)]
    segments = []
    for j in range(i):
        distances = np.abs((2 * j + 1) * fmt.bound - 2 * fmt.magnitudes() * i)
        segments.append(levels - 1 - int(np.argmin(distances[::-1])))
    return segments


def reference_divergence(h, i, fmt):
    p = h[:i].astype(float)
    p[-1] += h[i:].sum()
    q = np.zeros(i)
    segments = np.array(segments_of(i, fmt))
    for segment in set(segments.tolist()):
        inside = (segments == segment) & (h[:i] > 0)
        if inside.any():
            q[inside] = h[:i][inside].sum() / inside.sum()
    if ((p > 0) & (q == 0)).any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def reference_entropy(h, fmt, start=128, stride=1):
    ends = candidates(h, max(start, len(fmt.magnitudes())), stride)
    h = h.copy()
    h[0] = h[1]
    if not h.any():
        return ends[-1]
    return largest_minimum(ends, [reference_divergence(h, i, fmt) for i in ends])


def reference_percentile(h, percentile):
    if not h.any():
        return 0.0
    target = max(1.0, percentile / 100 * h.sum())
    below = 0
    for j, count in enumerate(h.tolist()):
        if count and below + count >= target:
            return j + (target - below) / count
        below += count
    return float(last_bin(h))


def adversarial(bins: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def of(values):
        return np.histogram(np.abs(values), bins, (0, bins))[0]

    cases = {
        "random": rng.integers(0, 100, bins),
        "normal": of(rng.normal(0, bins / 8, 20000)),
        "sparse": rng.integers(0, 50, bins) * (rng.random(bins) < 0.05),
        "two modes": of(
            np.r_[rng.normal(bins * 0.1, 2, 5000), rng.normal(bins * 0.7, bins / 50, 3000)]
        ),
        "heavy tail": of(np.clip(rng.pareto(1.0, 30000), 0, bins - 1)),
        "relu": of(np.maximum(rng.normal(0, bins / 6, 20000), 0)),
        "empty tail": np.r_[
            of(rng.normal(0, bins / 20, 5000))[: bins // 4], np.zeros(bins * 3 // 4)
        ],
        "short": of(rng.normal(0, bins / 40, 5000)),
        "exponential": (1e12 * np.exp(-np.arange(bins) / (bins / 64))),
    }
    for name, places in {
        "spike": {bins * 2 // 3: 1000},
        "last": {bins - 1: 1},
        "zeros": {0: 10**9},
        "bin 1": {1: 5},
        "zeros and spike": {0: 10**6, bins // 2 + 3: 1},
        "two spikes": {bins // 3: 77, bins // 2 + 1: 1},
        "outliers": {0: 10**6, 1: 10**3, bins - 9: 1, bins - 2: 1},
        "nothing": {},
    }.items():
        cases[name] = np.zeros(bins)
        for place, count in places.items():
            cases[name][place] = count
    return {name: h.astype(np.int64) for name, h in cases.items()}


CASES = adversarial(320)
COUNTS = torch.from_numpy(np.stack(list(CASES.values())))
WIDTH = torch.full((len(CASES),), 0.25)


def check(amax, expected):
    found = dict(zip(CASES, (amax / 0.25).tolist(), strict=True))
    assert found == pytest.approx(dict(zip(CASES, expected, strict=True)), rel=1e-6)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(("start", "stride"), [(128, 1), (3, 7)])
def test_mse_equals_the_reference(fmt, start, stride):
    amax = mse_amax(COUNTS, WIDTH, fmt, start_bin=start, stride=stride)
    check(amax, [reference_mse(h, fmt, start, stride) for h in CASES.values()])


@pytest.mark.parametrize("p", [0.5, 1, 2.4, 4])
@pytest.mark.parametrize("fmt", [INT4, INT8, E4M3], ids=lambda f: f.name)
def test_lp_equals_the_reference(p, fmt):
    amax = lp_amax(COUNTS, WIDTH, fmt, p, start_bin=20)
    check(amax, [reference_mse(h, fmt, 20, p=p) for h in CASES.values()])


def errors_of(h, i, fmt):
    """The magnitudes of the errors of the bins with counts under candidate `i`, in bins."""
    values, centres = fmt.magnitudes() * i / fmt.bound, np.flatnonzero(h) + 0.5
    return np.abs(centres - values[np.searchsorted((values[1:] + values[:-1]) / 2, centres)])


def assert_least(h, amax, fmt, p, start=128, stride=1):
    """The found candidate has the least error, to rounding, in logarithms."""
    ends = candidates(h, start, stride)
    logs = []
    for i in ends:
        error = np.maximum(errors_of(h, i, fmt), 1e-9)
        logs.append(np.logaddexp.reduce(np.log(h[h > 0]) + p * np.log(error)))
    assert amax in ends
    assert logs[ends.index(amax)] <= min(logs) + 1e-6


@given(
    st.lists(st.integers(0, 6) | st.just(0) | st.integers(0, 10**9), min_size=300, max_size=300),
    st.sampled_from([INT8, UINT8, INT4, E4M3]),
    st.floats(0.5, 12) | st.sampled_from([10.0, 12.0]),
    st.integers(1, 300),
    st.integers(1, 9),
)
@settings(max_examples=40)
def test_lp_finds_the_least_error_for_any_power(counts, fmt, p, start, stride):
    h = np.array(counts)
    h[0] += 1
    tensor = torch.from_numpy(h)[None]
    found = float(lp_amax(tensor, torch.ones(1), fmt, p, start_bin=start, stride=stride))
    assert_least(h, found, fmt, p, start, stride)


@pytest.mark.slow
@pytest.mark.parametrize("p", [10, 20, 30, 31, 100, 1000])
@pytest.mark.parametrize("fmt", [INT4, INT8, E4M3, IntFormat(16)], ids=lambda f: f.name)
def test_large_powers(p, fmt):
    cases = adversarial(2048)
    counts = torch.from_numpy(np.stack([cases["normal"], cases["short"], cases["nothing"]]))
    amax = lp_amax(counts, torch.ones(3), fmt, p).tolist()
    assert amax[2] == 0
    for name, found in zip(("normal", "short"), amax, strict=False):
        assert_least(cases[name], found, fmt, p)
    # The search is free of scale: the same values in bins of the next power of two.
    half = torch.nn.functional.pad(counts, (0, 2048))
    assert lp_amax(half, torch.ones(3), fmt, p).tolist() == amax


def test_a_larger_p_clips_less_of_a_normal_distribution():
    h = torch.from_numpy(CASES["normal"])[None]
    amax = [float(lp_amax(h, torch.ones(1), INT4, p, start_bin=1)) for p in (1, 2, 4)]
    assert amax[0] < amax[1] < amax[2]


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(("start", "stride"), [(128, 1), (5, 9)])
def test_entropy_equals_the_reference(fmt, start, stride):
    amax = entropy_amax(COUNTS, WIDTH, fmt, start_bin=start, stride=stride)
    check(amax, [reference_entropy(h, fmt, start, stride) for h in CASES.values()])


@pytest.mark.parametrize("percentile", [0, 1e-9, 50, 99.9, 99.99, 100])
def test_percentile_equals_the_reference(percentile):
    amax = percentile_amax(COUNTS, WIDTH[:, None], percentile)
    check(amax, [reference_percentile(h, percentile) for h in CASES.values()])


@given(
    st.lists(st.integers(0, 6) | st.just(0) | st.integers(0, 10**9), min_size=40, max_size=40),
    st.sampled_from([INT4, IntFormat(3, signed=False), IntFormat(5), E2M1]),
    st.integers(1, 50),
    st.integers(1, 5),
)
@settings(max_examples=40)
def test_random_histograms_equal_the_references(counts, fmt, start, stride):
    h = np.array(counts)
    tensor, width = torch.from_numpy(h)[None], torch.ones(1)
    options = {"start_bin": start, "stride": stride}
    assert float(mse_amax(tensor, width, fmt, **options)) == reference_mse(h, fmt, start, stride)
    found = float(entropy_amax(tensor, width, fmt, **options))
    assert found == reference_entropy(h, fmt, start, stride)


def test_entropy_at_the_default_size():
    h = adversarial(2048)["relu"]
    found = float(entropy_amax(torch.from_numpy(h)[None], torch.ones(1), INT8, stride=16))
    assert found == reference_entropy(h, INT8, stride=16)


@pytest.mark.parametrize("search", [mse_amax, entropy_amax, lp_amax])
@pytest.mark.parametrize("fmt", [INT8, E4M3], ids=lambda f: f.name)
def test_a_batch_gives_what_single_histograms_give(search, fmt, monkeypatch):
    together = search(COUNTS, WIDTH, fmt)
    single = [search(COUNTS[i : i + 1], WIDTH[i : i + 1], fmt) for i in range(len(CASES))]
    assert torch.equal(together, torch.cat(single))
    monkeypatch.setattr("pytorch_quant.calib.search._STEP", 1000)
    assert torch.equal(together, search(COUNTS, WIDTH, fmt))


def test_results_stay_between_zero_and_the_maximum():
    maximum = torch.tensor([last_bin(h) - 0.3 if h.any() else 0.0 for h in CASES.values()]) * 0.25
    filled = COUNTS.sum(1) > 0
    for fmt in FORMATS:
        for search in (mse_amax, entropy_amax):
            for start in (1, 128, 5000):
                amax = search(COUNTS, WIDTH, fmt, start_bin=start, maximum=maximum)
                assert amax.shape == maximum.shape
                assert amax.dtype == torch.float32
                assert (amax <= maximum).all()
                assert torch.equal(amax > 0, filled)
            assert torch.equal(search(COUNTS, WIDTH, fmt, start_bin=5000, maximum=maximum), maximum)
    for percentile in (0, 50, 100):
        amax = percentile_amax(COUNTS, WIDTH, percentile, maximum=maximum)
        assert (amax <= maximum).all()
        assert torch.equal(amax > 0, filled)
    assert torch.equal(amax, maximum)


@pytest.mark.parametrize("bins", [1, 2, 7])
def test_few_bins(bins):
    counts = torch.arange(1, bins + 1)[None]
    for search in (mse_amax, entropy_amax):
        for fmt in (IntFormat(2), INT8, E4M3):
            assert float(search(counts, torch.ones(1), fmt)) == bins
            assert 0 < float(search(counts, torch.ones(1), fmt, start_bin=1)) <= bins


def test_the_largest_of_equal_candidates_wins():
    counts = torch.zeros(50, 300, dtype=torch.int64)
    counts[:, 150] = torch.arange(1, 51) ** 3
    counts[:, 250] = torch.arange(50, 0, -1)
    # Both spikes have a segment of their own, and with the second one clipped P has one bin only.
    assert (entropy_amax(counts, torch.ones(50), INT8) == 251).all()


def test_one_spike_keeps_its_value():
    histogram = Histogram()
    histogram.update(torch.full((1000,), 5.3))
    for search in (mse_amax, entropy_amax):
        amax = search(histogram.counts, histogram.width, INT8, maximum=histogram.maximum)
        assert float(amax) == pytest.approx(5.3)


@pytest.mark.parametrize("fmt", [INT4, INT8, E2M1], ids=lambda f: f.name)
def test_mse_finds_the_least_error_of_real_values(fmt):
    x = torch.randn(20000)
    histogram = Histogram()
    histogram.update(x)

    def error(amax):
        return float((fake_quantize(x, torch.as_tensor(amax), fmt) - x).square().mean())

    amax = mse_amax(histogram.counts, histogram.width, fmt, maximum=histogram.maximum)
    least = min(error(a) for a in np.linspace(0.2, 1, 60) * float(histogram.maximum))
    assert error(amax) <= 1.02 * least


@pytest.mark.parametrize("p", [0, -1, float("inf"), float("nan")])
def test_a_power_out_of_range(p):
    with pytest.raises(ValueError, match="out of range"):
        lp_amax(COUNTS, WIDTH, INT8, p)


def test_wrong_arguments_of_searches():
    for percentile in (-0.1, 100.1, float("nan")):
        with pytest.raises(ValueError, match="range"):
            percentile_amax(COUNTS, WIDTH, percentile)
    for search in (mse_amax, entropy_amax):
        for wrong in ({"start_bin": 0}, {"stride": 0}):
            with pytest.raises(ValueError, match="at least 1"):
                search(COUNTS, WIDTH, INT8, **wrong)
