import gc
import weakref

import pytest
import torch

from pytorch_quant.calib import HistogramCalibrator, MaxCalibrator, observation
from pytorch_quant.calib.observation import observe, shared_observations


@pytest.fixture
def counted(monkeypatch):
    """How often a tensor was counted."""
    calls = []
    count = observation.range_and_counts

    def counting(*args):
        calls.append(args)
        return count(*args)

    monkeypatch.setattr(observation, "range_and_counts", counting)
    return calls


def test_calibrators_that_meet_one_tensor_count_it_once(counted):
    x = torch.randn(5, 40)
    both = [HistogramCalibrator(), HistogramCalibrator(4)]
    # The ranges differ, and still the counts are shared.
    both[1].collect(torch.tensor([17.0]))
    counted.clear()
    with shared_observations():
        for calibrator in both:
            calibrator.collect(x)
    assert len(counted) == 1
    alone = [HistogramCalibrator(), HistogramCalibrator(4)]
    alone[1].collect(torch.tensor([17.0]))
    for calibrator, other in zip(alone, both, strict=True):
        calibrator.collect(x)
        state = calibrator.state()
        assert all(torch.equal(state[k], v) for k, v in other.state().items())


def test_nothing_is_shared_outside_the_block(counted):
    x = torch.randn(5)
    for _ in range(2):
        HistogramCalibrator().collect(x)
    assert len(counted) == 2


def test_a_tensor_that_was_written_to_is_another_one():
    x = torch.ones(5)
    calibrator = MaxCalibrator(track_amax=True)
    with shared_observations(), torch.no_grad():
        calibrator.collect(x)
        x.mul_(3)
        calibrator.collect(x)
        view = x[:2]
        view.mul_(2)
        calibrator.collect(x)
    assert [float(a) for a in calibrator.amaxs] == [1, 3, 6]


def test_counts_that_nobody_announced():
    x = torch.randn(5, 40)
    with shared_observations():
        maxima, histogram, finer = MaxCalibrator(), HistogramCalibrator(), HistogramCalibrator()
        finer._num_bins = 4096
        for calibrator in (maxima, histogram, finer):
            calibrator.collect(x)
    for calibrator, bins in ((histogram, 2048), (finer, 4096)):
        alone = HistogramCalibrator(num_bins=bins)
        alone.collect(x)
        state = alone.state()
        assert all(torch.equal(state[k], v) for k, v in calibrator.state().items())


def test_tensors_of_inference_mode():
    calibrator = MaxCalibrator(track_amax=True)
    with shared_observations(), torch.inference_mode():
        x = torch.ones(5)
        calibrator.collect(x)
        x.mul_(3)
        calibrator.collect(x)
    assert [float(a) for a in calibrator.amaxs] == [1, 3]


def test_each_axis_has_its_own_maxima():
    x = torch.randn(3, 4)
    with shared_observations():
        assert torch.equal(observe(x, 0).maximum, x.abs().amax(1, keepdim=True))
        assert torch.equal(observe(x, 1).maximum, x.abs().amax(0, keepdim=True))
        assert torch.equal(observe(x, None).maximum, x.abs().amax())
        assert observe(x, 0) is observe(x, 0)


def test_tensors_are_not_kept():
    with shared_observations():
        x = torch.randn(100)
        kept = weakref.ref(x)
        HistogramCalibrator().collect(x)
        del x
        gc.collect()
        assert kept() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float16, torch.bfloat16])
def test_other_types(dtype):
    x = (torch.randn(50) * 20).to(dtype)
    with shared_observations():
        first, second = HistogramCalibrator(), MaxCalibrator()
        first.collect(x)
        second.collect(x)
    assert torch.equal(first.compute_amax("max"), x.float().abs().max())
    assert torch.equal(second.compute_amax(), x.float().abs().max())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("size", [3, 40])
def test_writes_that_autograd_does_not_count(order, every, size):
    x = torch.ones(2 * every, size, 5)[::every].permute(order)
    calibrator = MaxCalibrator(track_amax=True)
    with shared_observations(), torch.no_grad():
        calibrator.collect(x)
        x.data.mul_(3)
        calibrator.collect(x)
        x.detach().numpy()[:] = 10
        calibrator.collect(x)
        assert observe(x, None) is observe(x, None)
    assert [float(a) for a in calibrator.amaxs] == [1, 3, 10]
