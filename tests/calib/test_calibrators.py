from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch

from pytorch_quant.calib import (
    CalibrationError,
    HistogramCalibrator,
    MaxCalibrator,
    entropy_amax,
    mse_amax,
    observation,
    percentile_amax,
)
from pytorch_quant.formats import FloatFormat, IntFormat

BOTH = [MaxCalibrator, HistogramCalibrator]
METHODS = ["max", "percentile", "mse", "entropy"]


def amax_of(calibrator, *batches, method="max", **options):
    for batch in batches:
        calibrator.collect(batch)
    return calibrator.compute_amax(method, **options)


@pytest.fixture(params=["at once", "deferred"])
def deferred(request, monkeypatch):
    """Checks that read values at once, and those of an accelerator."""
    if request.param == "deferred":
        monkeypatch.setattr(observation, "HOST_TYPES", ())
    return request.param == "deferred"


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (0, 1, 2)])
@pytest.mark.usefixtures("deferred")
def test_max(kind, axis, device):
    batches = [torch.randn(3, 4, 5, device=device) * scale for scale in (1, 3, 2)]
    amax = amax_of(kind(8, axis, False), *batches)
    stacked = np.stack([np.abs(b.cpu().numpy()) for b in batches]).max(0)
    kept = () if axis is None else (axis,) if isinstance(axis, int) else axis
    reduced = tuple(a for a in range(3) if a not in [k % 3 for k in kept])
    expected = stacked.max() if axis is None else stacked.max(reduced, keepdims=True)
    assert amax.shape == expected.shape
    assert amax.dtype == torch.float32
    assert amax.device.type == device.type
    np.testing.assert_array_equal(amax.cpu().numpy(), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_bits", [8, 4, (4, 3)])
@pytest.mark.parametrize("axis", [None, 1])
def test_histogram_methods_are_the_searches(method, num_bits, axis):
    batches = [torch.randn(6, 3, 50) * torch.tensor([1.0, 2.0, 30.0])[:, None] for _ in range(2)]
    calibrator = HistogramCalibrator(num_bits, axis, False, num_bins=512)
    options = {"percentile": 99.0} if method == "percentile" else {}
    amax = amax_of(calibrator, *batches, method=method, **options)
    fmt = FloatFormat(4, 3) if num_bits == (4, 3) else IntFormat(num_bits)
    h = calibrator.histogram
    expected = {
        "max": lambda: h.maximum,
        "percentile": lambda: percentile_amax(h.counts, h.width, 99.0, maximum=h.maximum),
        "mse": lambda: mse_amax(h.counts, h.width, fmt, maximum=h.maximum),
        "entropy": lambda: entropy_amax(h.counts, h.width, fmt, maximum=h.maximum),
    }[method]()
    assert torch.equal(amax, expected.reshape(() if axis is None else (1, 3, 1)))
    assert torch.equal(h.maximum, calibrator.compute_amax("max").flatten())
    if axis == 1:
        for channel in range(3):
            single = HistogramCalibrator(num_bits, None, False, num_bins=512)
            alone = amax_of(single, *(b[:, channel] for b in batches), method=method, **options)
            assert float(amax[0, channel, 0]) == float(alone)


def test_options_reach_the_searches():
    calibrator = HistogramCalibrator(4, None, False)
    calibrator.collect(torch.randn(20000))
    low = calibrator.compute_amax("percentile", percentile=50)
    assert float(low) == pytest.approx(0.6745, abs=0.03)
    high = calibrator.compute_amax("mse", start_bin=2000)
    assert torch.equal(high, calibrator.compute_amax("max"))
    assert calibrator.compute_amax("mse", stride=500) != calibrator.compute_amax("mse")
    unsigned = HistogramCalibrator(4, None, True)
    unsigned.collect(torch.randn(20000).abs())
    assert unsigned.compute_amax("mse") > calibrator.compute_amax("mse") * 1.05


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.usefixtures("deferred")
def test_nothing_seen_and_reset(kind):
    calibrator = kind(8, None, False)
    assert calibrator.compute_amax("max") is None
    calibrator.collect(torch.zeros(0, 3))
    assert calibrator.compute_amax("max") is None
    calibrator.collect(torch.zeros(2, 3))
    assert float(calibrator.compute_amax("max")) == 0
    calibrator.reset()
    assert calibrator.compute_amax("max") is None
    assert float(amax_of(calibrator, torch.tensor([-2.0]))) == 2


@pytest.mark.parametrize("method", METHODS)
def test_only_zeros_have_amax_0(method):
    assert float(amax_of(HistogramCalibrator(8, None, False), torch.zeros(9), method=method)) == 0
    skipping = HistogramCalibrator(8, None, False, skip_zeros=True)
    assert float(amax_of(skipping, torch.zeros(9), method=method)) == 0


def test_skip_zeros_changes_percentiles():
    x = torch.cat([torch.zeros(9000), torch.rand(1000)])
    counted = amax_of(HistogramCalibrator(8, None, False), x, method="percentile", percentile=50)
    skipping = HistogramCalibrator(8, None, False, skip_zeros=True)
    assert float(counted) < 0.01
    assert float(amax_of(skipping, x, method="percentile", percentile=50)) == pytest.approx(
        0.5, abs=0.05
    )


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [None, 0])
def test_non_finite_values(kind, bad, axis, deferred):
    calibrator = kind(8, axis, False)
    calibrator.collect(torch.tensor([1.0, 2.0]))
    before = calibrator.compute_amax("max")
    if deferred:
        calibrator.collect(torch.tensor([7.0, bad]))
        calibrator.collect(torch.tensor([99.0, 99.0]))
        with pytest.raises(CalibrationError, match=r"NaN or Inf in batch 1 \(counted from 0\)"):
            calibrator.compute_amax("max")
    else:
        with pytest.raises(CalibrationError, match="NaN or Inf in 1 of 2 values"):
            calibrator.collect(torch.tensor([7.0, bad]))
    assert torch.equal(calibrator.compute_amax("max"), before)
    calibrator.collect(torch.tensor([3.0, 3.0]))
    assert float(calibrator.compute_amax("max").max()) == 3


@pytest.mark.parametrize("kind", BOTH)
def test_negative_values_of_an_unsigned_quantizer(kind, deferred):
    calibrator = kind(8, None, True)
    calibrator.collect(torch.tensor([0.0, -0.0, 2.0]))
    with pytest.raises(CalibrationError, match=r"negative.*minimum -0\.25.*unsigned=False"):
        calibrator.collect(torch.tensor([7.0, -0.25, 3.0]))
        assert deferred
        calibrator.compute_amax("max")
    assert float(calibrator.compute_amax("max")) == 2
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        calibrator.collect(torch.tensor([-1.0, float("nan")]))
        calibrator.compute_amax("max")


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.usefixtures("deferred")
def test_a_bad_first_batch_is_nothing_seen(kind):
    calibrator = kind(8, None, False)
    with pytest.raises(CalibrationError):
        calibrator.collect(torch.tensor([float("nan")]))
        calibrator.compute_amax("max")
    assert calibrator.compute_amax("max") is None
    assert float(amax_of(calibrator, torch.tensor([4.0]))) == 4


@pytest.mark.parametrize("kind", BOTH)
def test_what_must_not_change_between_batches(kind):
    calibrator = kind(8, 0, False)
    calibrator.collect(torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="shape changed"):
        calibrator.collect(torch.ones(4, 4))
    calibrator.collect(torch.ones(3, 9))
    with pytest.raises(RuntimeError, match=r"from cpu to meta"):
        calibrator.collect(torch.ones(3, 4, device="meta"))
    with pytest.raises(ValueError, match="axis 0 is out of range"):
        calibrator.collect(torch.tensor(1.0))
    assert float(amax_of(kind(8, None, False), torch.ones(3), torch.ones(2, 5) * 2)) == 2


def test_max_answers_no_other_method():
    calibrator = MaxCalibrator(8, None, False)
    calibrator.collect(torch.ones(3))
    assert float(calibrator.compute_amax()) == 1
    with pytest.raises(ValueError, match=r"only maxima were collected.*HistogramCalibrator"):
        calibrator.compute_amax("percentile", percentile=99)
    with pytest.raises(TypeError, match="percentile"):
        calibrator.compute_amax("max", percentile=99)


def test_wrong_calls_of_histogram_compute_amax():
    calibrator = HistogramCalibrator(8, None, False)
    calibrator.collect(torch.ones(3))
    with pytest.raises(ValueError, match=r"'median'.*'max', 'mean_max'.*'entropy', 'lp', 'best'"):
        calibrator.compute_amax("median")
    for percentile in (-1, 101):
        with pytest.raises(ValueError, match="range"):
            calibrator.compute_amax("percentile", percentile=percentile)
    with pytest.raises(TypeError, match="bins"):
        calibrator.compute_amax("mse", bins=4)


@pytest.mark.parametrize("kind", BOTH)
def test_wrong_constructor_arguments(kind):
    with pytest.raises(TypeError):
        kind((5, 2), None, False)
    with pytest.raises(ValueError, match="17"):
        kind(17, None, False)
    with pytest.raises(TypeError, match="axis"):
        kind(8, "0", False)


def test_track_amax():
    calibrator = MaxCalibrator(8, None, False, track_amax=True)
    for value in (1.0, 5.0, 3.0):
        calibrator.collect(torch.tensor([-value, 0.5]))
    np.testing.assert_array_equal(calibrator.amaxs, [1, 5, 3])
    calibrator.amaxs[0][...] = 9
    assert float(calibrator.compute_amax()) == 5
    calibrator.reset()
    assert calibrator.amaxs == []
    assert amax_of(MaxCalibrator(8, None, False), torch.ones(1)) == 1


def test_tracked_maxima_leave_out_bad_batches(monkeypatch):
    monkeypatch.setattr(observation, "HOST_TYPES", ())
    calibrator = MaxCalibrator(8, 0, False, track_amax=True)
    calibrator.collect(torch.tensor([1.0, 2.0]))
    calibrator.collect(torch.tensor([1.0, float("nan")]))
    calibrator.collect(torch.tensor([5.0, 5.0]))
    np.testing.assert_array_equal(calibrator.amaxs, [[1, 2]])


def test_the_result_is_no_alias():
    for calibrator in (MaxCalibrator(8, None, False), HistogramCalibrator(8, None, False)):
        amax_of(calibrator, torch.ones(3)).fill_(7)
        assert float(calibrator.compute_amax("max")) == 1


def test_attributes_that_programs_read():
    calibrator = HistogramCalibrator(8, None, True, num_bins=16, skip_zeros=True)
    assert (calibrator._num_bits, calibrator._axis, calibrator._unsigned) == (8, None, True)
    assert (calibrator._num_bins, calibrator._skip_zeros, calibrator._torch_hist) == (
        16,
        True,
        True,
    )
    calibrator._torch_hist = False
    assert calibrator._calib_hist is None
    assert calibrator._calib_bin_edges is None
    calibrator.collect(torch.tensor([0.0, 0.5, 0.75]))
    assert calibrator._calib_hist.tolist() == [0] * 8 + [1, 0, 0, 0, 1, 0, 0, 0]
    assert torch.equal(calibrator._calib_bin_edges, torch.arange(17) / 16)
    per_channel = HistogramCalibrator(8, 0, False, num_bins=16)
    per_channel.collect(torch.ones(2, 3))
    assert per_channel._calib_hist.shape == (2, 16)
    assert per_channel._calib_bin_edges.shape == (2, 17)
    maxima = MaxCalibrator([4, 3], -1, False)
    assert (maxima._num_bits, maxima._axis, maxima._track_amax) == ((4, 3), -1, False)
    assert maxima._calib_amax is None
    maxima.collect(torch.tensor([[1.0, -3.0]]))
    assert maxima._calib_amax.tolist() == [[1.0, 3.0]]
    assert repr(maxima) == "MaxCalibrator(num_bits=(4, 3), axis=-1, unsigned=False)"
    parameters = list(inspect.signature(HistogramCalibrator.__init__).parameters)[1:]
    assert parameters == [
        "num_bits", "axis", "unsigned", "num_bins", "grow_method", "skip_zeros", "torch_hist",
        "momentum",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("axis", [None, 0, (0, 1)])
def test_statistics_are_ordinary_tensors(kind, axis):
    calibrator = kind(8, axis, False)
    with torch.inference_mode():
        calibrator.collect(torch.randn(2, 5))
        from_inference = calibrator.compute_amax("max")
    assert not any(torch.is_tensor(v) and v.is_inference() for v in vars(calibrator).values())
    calibrator.collect(torch.randn(2, 5, requires_grad=True) * 3)
    amax = calibrator.compute_amax("max")
    assert not from_inference.is_inference()
    assert not amax.requires_grad
    for clone in (copy.deepcopy(calibrator), pickle.loads(pickle.dumps(calibrator))):
        assert torch.equal(clone.compute_amax("max"), amax)
        assert float(amax_of(clone, torch.full((2, 5), 50.0)).max()) == 50
    assert torch.equal(calibrator.compute_amax("max"), amax)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_dtypes_of_batches(kind, dtype):
    x = (torch.randn(4, 6) * 9).to(dtype)
    for axis in (None, 0):
        amax = amax_of(kind(8, axis, False), x)
        assert amax.dtype == torch.float32
        expected = x.float().abs().amax(1, keepdim=True)
        assert torch.equal(amax, expected if axis == 0 else expected.amax())
