import numpy as np
import pytest
import torch

from pytorch_quant.calib import HistogramCalibrator, MaxCalibrator, observation
from pytorch_quant.calib.maxima import Maxima

BOTH = [MaxCalibrator, HistogramCalibrator]


def batches(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 3, 4, generator=generator) * (1 + i % 4) for i in range(count)]


def maxima_of(given, axis):
    reduced = tuple(a for a in range(3) if a != axis)
    return np.stack(
        [
            np.abs(x.numpy()).max()
            if axis is None
            else np.abs(x.numpy()).max(reduced, keepdims=True)
            for x in given
        ]
    ).astype(np.float64)


def moving_average(maxima, momentum):
    moving = maxima[0]
    for maximum in maxima[1:]:
        moving = momentum * moving + (1 - momentum) * maximum
    return moving


@pytest.fixture(params=["at once", "deferred"])
def deferred(request, monkeypatch):
    if request.param == "deferred":
        monkeypatch.setattr(observation, "HOST_TYPES", ())


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.usefixtures("deferred")
def test_mean_and_moving_maximum(kind, axis, device):
    given = batches()
    calibrator = kind(8, axis, momentum=0.7)
    for x in given:
        calibrator.collect(x.to(device))
    expected = maxima_of(given, axis)
    for method, value in {
        "max": expected.max(0),
        "mean_max": expected.mean(0),
        "moving_max": moving_average(expected, 0.7),
    }.items():
        amax = calibrator.compute_amax(method)
        assert amax.dtype == torch.float32
        assert amax.shape == value.shape
        np.testing.assert_allclose(amax.cpu().numpy(), value, rtol=2e-7)
    assert calibrator.seen == sum(x.numel() for x in given)


@pytest.mark.parametrize("kind", BOTH)
def test_a_bad_batch_changes_nothing(kind, monkeypatch):
    monkeypatch.setattr(observation, "HOST_TYPES", ())
    calibrator = kind(8, None)
    for x in (*batches(3), torch.tensor([float("nan"), 9.0])):
        calibrator.collect(x)
    with pytest.raises(ValueError, match="batch 3"):
        calibrator.state()
    expected = maxima_of(batches(3), None)
    assert float(calibrator.compute_amax("mean_max")) == pytest.approx(expected.mean())
    assert float(calibrator.compute_amax("moving_max")) == pytest.approx(
        moving_average(expected, 0.9)
    )
    assert calibrator.seen == 3 * 72


def test_merging():
    first, second = batches(4), batches(2, seed=1)
    merged, other = Maxima(()), Maxima(())
    for maxima, given in ((merged, first), (other, second)):
        for x in given:
            maxima.update(x.abs().amax(), x.numel())
    moving = [float(merged.moving), float(other.moving)]
    merged.merge(other)
    expected = maxima_of(first + second, None)
    assert float(merged.amax("max")) == np.float32(expected.max())
    assert float(merged.amax("mean_max")) == pytest.approx(expected.mean(), rel=1e-6)
    assert float(merged.moving) == pytest.approx((4 * moving[0] + 2 * moving[1]) / 6)
    assert (int(merged.batches), int(merged.seen)) == (6, 6 * 72)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("axis", [None, 1])
def test_the_state_comes_back(kind, axis):
    calibrator = kind(8, axis)
    for x in batches():
        calibrator.collect(x)
    state = calibrator.state()
    assert set(state) == set(kind.reductions)
    again = kind(8, axis)
    again.load_state(state)
    methods = ["max", "mean_max", "moving_max"]
    methods += ["percentile", "entropy"] if kind is HistogramCalibrator else []
    for method in methods:
        assert torch.equal(again.compute_amax(method), calibrator.compute_amax(method))
    # The state is a copy, and both go on from it.
    again.collect(torch.full((6, 3, 4), 99.0))
    assert float(calibrator.compute_amax("max").max()) < 99
    assert float(again.compute_amax("max").max()) == 99
    again.load_state({})
    assert again.compute_amax("max") is None


@pytest.mark.parametrize("kind", BOTH)
def test_a_state_of_another_kind_is_refused(kind):
    calibrator = kind(8, None)
    calibrator.collect(torch.ones(3))
    state = calibrator.state()
    with pytest.raises(ValueError, match="batches"):
        calibrator.load_state({k: v for k, v in state.items() if k != "batches"})
    assert float(calibrator.compute_amax("max")) == 1
    with pytest.raises(ValueError, match=r"counts|bins"):
        HistogramCalibrator(8, None, num_bins=64).load_state(state)


def test_methods_of_maxima_take_no_options():
    calibrator = MaxCalibrator()
    calibrator.collect(torch.ones(3))
    with pytest.raises(TypeError, match=r"mean_max.*takes no options"):
        calibrator.compute_amax("mean_max", momentum=0.5)
    with pytest.raises(ValueError, match="'lp'"):
        calibrator.compute_amax("lp")
