from __future__ import annotations

import copy
import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch_quant.calib import CalibrationError, Histogram, counting


def of(*batches: torch.Tensor, bins: int = 64, channels: int = 1, **options) -> Histogram:
    histogram = Histogram(bins, channels, **options)
    for batch in batches:
        histogram.update(batch)
    return histogram


def equal(a: Histogram, b: Histogram) -> bool:
    left, right = a.state(), b.state()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def expected_counts(x, bins: int, exponent: int, skip_zeros: bool = False) -> list[int]:
    """floor(|x| * bins / 2**exponent), in rational numbers."""
    counts = [0] * bins
    for value in np.asarray(x, np.float32).ravel().tolist():
        if value or not skip_zeros:
            counts[int(abs(Fraction(value)) * bins / Fraction(2) ** exponent)] += 1
    return counts


floats = st.one_of(
    st.floats(-1000, 1000, width=32),
    st.integers(-64, 64).map(lambda k: k / 8),
    st.integers(-120, 120).map(lambda e: 2.0**e),
    st.just(0.0),
)
batches = st.lists(st.lists(floats, max_size=12), min_size=1, max_size=5)


@given(batches, st.sampled_from([1, 2, 3, 48, 64, 100, 2048]), st.booleans())
def test_counts_are_exact(values, bins, skip_zeros):
    tensors = [torch.tensor(v, dtype=torch.float32) for v in values]
    histogram = of(*tensors, bins=bins, skip_zeros=skip_zeros)
    flat = torch.cat(tensors)
    expected = expected_counts(flat, bins, int(histogram.exponent), skip_zeros)
    assert histogram.counts[0].tolist() == expected
    assert int(histogram.seen) == flat.numel()
    largest = float(flat.abs().max()) if flat.numel() else 0.0
    assert float(histogram.maximum) == largest
    assert 2.0 ** int(histogram.exponent) > largest
    if largest >= 2.0**counting.LEAST_EXPONENT:
        assert 2.0 ** int(histogram.exponent) <= 2 * largest


@given(batches, st.randoms(use_true_random=False), st.sampled_from([64, 100]))
def test_the_order_of_batches_does_not_matter_and_merging_is_exact(values, random, bins):
    tensors = [torch.tensor(v, dtype=torch.float32) for v in values]
    whole = of(torch.cat(tensors), bins=bins)
    shuffled = tensors.copy()
    random.shuffle(shuffled)
    assert equal(whole, of(*shuffled, bins=bins))
    cut = random.randint(0, len(tensors))
    left, right = of(*tensors[:cut], bins=bins), of(*shuffled[:0], *tensors[cut:], bins=bins)
    other = copy.deepcopy(right)
    other.merge(left)
    left.merge(right)
    assert equal(whole, left)
    assert equal(whole, other)


@pytest.mark.parametrize(
    "n", [1, 5, 1000, counting._BLOCK - 1, counting._BLOCK, 2 * counting._BLOCK + 7]
)
@pytest.mark.parametrize("relu", [False, True])
def test_equals_numpy_histogram_for_large_tensors(n, relu):
    x = torch.randn(n)
    x = x.relu() if relu else x
    histogram = of(x, bins=2048)
    edges = histogram.edges[0].numpy()
    counts, _ = np.histogram(x.abs().numpy(), edges)
    np.testing.assert_array_equal(histogram.counts[0].numpy(), counts)
    assert edges[0] == 0
    assert edges[-1] == 2.0 ** int(histogram.exponent)
    assert float(histogram.width) == edges[1]


@pytest.mark.parametrize("bins", [64, 100])
def test_the_fast_count_equals_the_general_one(bins):
    x = torch.randn(5000)
    exponent = torch.tensor([3])
    general = counting._count_anywhere(x[None], bins, exponent)[0]
    assert torch.equal(counting.count_rows(x[None], bins, exponent)[0], general)
    assert general.tolist() == expected_counts(x, bins, 3)


def test_borders_of_bins_that_float32_does_not_hold():
    borders = torch.arange(1, 100) / 100
    x = torch.cat([torch.nextafter(borders, torch.tensor(v)) for v in (0.0, 1.0)] + [borders])
    assert of(x, bins=100).counts[0].tolist() == expected_counts(x, 100, 0)
    assert counting._count_anywhere(x[None], 100, torch.tensor([0]))[0].tolist() == expected_counts(
        x, 100, 0
    )


def test_the_range_doubles_and_merges_neighbouring_bins():
    histogram = of(torch.tensor([0.1, 0.3, 0.6, 0.9]), bins=4)
    assert histogram.counts.tolist() == [[1, 1, 1, 1]]
    histogram.update(torch.tensor([-1.0]))
    assert histogram.counts.tolist() == [[2, 2, 1, 0]]
    assert histogram.exponent.tolist() == [1]
    histogram.update(torch.tensor([1e30]))
    assert histogram.counts[0, 0] == 5
    assert histogram.counts.sum() == 6


def test_zeros_first():
    histogram = of(torch.zeros(3), torch.zeros(0), torch.tensor([0.75]), bins=8)
    assert histogram.counts.tolist() == [[3, 0, 0, 0, 0, 0, 1, 0]]
    skipping = of(torch.zeros(3), torch.tensor([0.75, 0.01, 0.0]), bins=8, skip_zeros=True)
    assert skipping.counts.tolist() == [[1, 0, 0, 0, 0, 0, 1, 0]]
    assert int(skipping.seen) == 6


@pytest.mark.parametrize("value", [3.4028234e38, 1e-30, 1e-38, 1e-45])
@pytest.mark.parametrize("bins", [64, 100])
def test_extreme_magnitudes(value, bins):
    x = torch.tensor([value, -value / 2])
    histogram = of(x, bins=bins)
    assert histogram.counts[0].tolist() == expected_counts(x, bins, int(histogram.exponent))
    general = counting._count_anywhere(x[None], bins, histogram.exponent)
    assert torch.equal(general, histogram.counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_dtypes_count_as_float32(dtype):
    x = (torch.randn(3000) * 5).to(dtype)
    assert equal(of(x), of(x.float()))


def test_memory_formats():
    x = torch.randn(2, 3, 4, 5)
    whole = of(x.flatten())
    assert equal(whole, of(x.to(memory_format=torch.channels_last)))
    assert equal(whole, of(x.transpose(0, 3)))
    assert equal(of(x[:, :, ::2].contiguous()), of(x[:, :, ::2]))
    assert equal(of(x[0].expand(4, 3, 4, 5).contiguous()), of(x[0].expand(4, 3, 4, 5)))
    assert equal(of(torch.tensor(1.5)), of(torch.tensor([1.5])))


def test_channels_are_counted_separately(device):
    first = torch.randn(3, 50, device=device) * torch.tensor([[1.0], [100.0], [0.0]], device=device)
    second = torch.randn(3, 20, device=device)
    joint = of(first, second, channels=3, device=device)
    for row in range(3):
        single = of(first[row], second[row], device=device)
        assert torch.equal(joint.counts[row], single.counts[0])
        assert joint.exponent[row] == single.exponent[0]
        assert joint.maximum[row] == single.maximum[0]
    split = of(first, channels=3, device=device)
    split.merge(of(second, channels=3, device=device))
    assert equal(joint, split)
    skipping = of(first, channels=3, skip_zeros=True, device=device)
    assert skipping.counts.sum(1).tolist() == [50, 50, 0]


def test_counts_pass_the_limit_of_float32():
    histogram = of(torch.ones(1))
    histogram.counts += 2**40
    histogram.update(torch.ones(3))
    assert int(histogram.counts[0, 32]) == 2**40 + 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_leave_the_statistics_alone(bad):
    histogram = of(torch.tensor([1.0, 2.0]))
    before = copy.deepcopy(histogram)
    with pytest.raises(CalibrationError, match="NaN or Inf in 1 of 3 values"):
        histogram.update(torch.tensor([9.0, bad, 9.0]))
    assert equal(histogram, before)
    histogram.update(torch.tensor([9.0, bad]), valid=torch.tensor(False))
    assert torch.equal(histogram.maximum, before.maximum)
    assert torch.equal(histogram.counts, before.counts)
    assert int(histogram.seen) == 2


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (Histogram(32), "bins"),
        (Histogram(64, 2), "channels"),
        (Histogram(64, skip_zeros=True), "skip_zeros"),
    ],
)
def test_different_formats_do_not_merge(other, field):
    with pytest.raises(ValueError, match=f"different formats.*{field}"):
        Histogram(64).merge(other)


def test_state_round_trip():
    histogram = of(torch.randn(100), skip_zeros=True)
    state = histogram.state()
    assert all(type(v) is torch.Tensor for v in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read = Histogram.from_state(torch.load(file, weights_only=True))
    assert equal(read, histogram)
    read.update(torch.randn(10) * 100)
    assert not torch.equal(read.counts, histogram.counts)
    with pytest.raises(ValueError, match=r"exponent.*nothing"):
        Histogram.from_state({"counts": state["counts"]})
    with pytest.raises(ValueError, match=r"maximum.*\(1,\).*\(2,\)"):
        Histogram.from_state({**state, "maximum": torch.zeros(2)})
    with pytest.raises(ValueError, match="counts of shape"):
        Histogram.from_state({})


def test_wrong_arguments():
    with pytest.raises(ValueError, match="bins=0"):
        Histogram(0)
    with pytest.raises(ValueError, match="channels"):
        Histogram(4, -1)
    with pytest.raises(ValueError, match=r"\(3, n\)"):
        Histogram(4, 3).update(torch.zeros(2, 5))


def test_statistics_from_inference_mode_are_ordinary_tensors():
    with torch.inference_mode():
        histogram = of(torch.randn(10), torch.randn(10) * 100)
        histogram.merge(of(torch.randn(10) * 1000))
    assert not any(v.is_inference() for v in vars(histogram).values() if torch.is_tensor(v))
    histogram.update(torch.randn(10, requires_grad=True) * 2)
    assert not any(v.requires_grad for v in vars(histogram).values() if torch.is_tensor(v))
    assert int(copy.deepcopy(histogram).counts.sum()) == 40


def test_independent_of_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        histogram = of(torch.randn(10, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert histogram.maximum.dtype == torch.float32
    assert int(histogram.counts.sum()) == 10
