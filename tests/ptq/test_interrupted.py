"""A pass that does not come to its end: what is kept is that of whole batches."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from pytorch_quant import CalibrationError, calibrate, compute_amax, quant_modules
from pytorch_quant.calib import HistogramCalibrator, MaxCalibrator
from pytorch_quant.nn.modes import named_quantizers


class Net(nn.Module):
    """Fails between its layers where the batch says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        with quant_modules.initialize():
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, failure=None):
        for i, layer in enumerate(self.layers):
            if i == 2 and failure is not None:
                if isinstance(failure, float):
                    x = x * failure
                else:
                    raise failure
            x = layer(x)
        return x


def batches(count=5):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(3, 4, generator=generator) * 2.0**i} for i in range(count)]


def states(model):
    return {
        name: q._calibrator.state()
        for name, q in named_quantizers(model).items()
        if "_input_" in name
    }


def assert_same(got, wanted):
    assert got.keys() == wanted.keys() and got
    for name, state in wanted.items():
        assert got[name].keys() == state.keys()
        assert all(torch.equal(got[name][key], value) for key, value in state.items()), name


FAILURES = [
    (float("nan"), CalibrationError),
    (ZeroDivisionError(), ZeroDivisionError),
    (KeyboardInterrupt(), KeyboardInterrupt),
]


@pytest.mark.parametrize("method", ["moving_max", "mse"])
@pytest.mark.parametrize(("failure", "error"), FAILURES)
def test_a_batch_that_fails_midway_leaves_no_trace(method, failure, error):
    given = batches()
    model, wanted = Net(), Net()
    broken = given[3] | {"failure": failure}
    with pytest.raises(error):
        calibrate(model, [*given[:3], broken], method, progress=False)
    calibrate(wanted, given[:3], method, progress=False)
    assert_same(states(model), states(wanted))
    calibrate(model, given[3:], method, progress=False, accumulate=True)
    calibrate(wanted, given, method, progress=False)
    assert_same(states(model), states(wanted))


@pytest.mark.parametrize("method", ["moving_max", "mse", "best"])
@pytest.mark.parametrize(("failure", "error"), FAILURES)
def test_accumulating_nothing_keeps_what_was_there(method, failure, error):
    given, model = batches(), Net()
    calibrate(model, given, method, progress=False)
    kept = states(model)
    best = [q._calibrator.best for q in named_quantizers(model).values()]
    momentum = {"momentum": 0.5} if method == "moving_max" else {}
    broken = [given[3] | {"failure": failure}]
    with pytest.raises(error):
        calibrate(model, broken, method, progress=False, accumulate=True, **momentum)
    assert_same(states(model), kept)
    assert [q._calibrator.best for q in named_quantizers(model).values()] == best
    assert model.layers[0]._input_quantizer._calibrator.momentum == 0.9


def test_tracked_maxima_come_back_too():
    given, model = batches(), Net()
    for layer in model.layers:
        layer._input_quantizer._calibrator = MaxCalibrator(track_amax=True)
    with pytest.raises(CalibrationError):
        calibrate(model, [*given[:2], given[2] | {"failure": float("nan")}], progress=False)
    assert [len(layer._input_quantizer._calibrator.amaxs) for layer in model.layers] == [2] * 4


@pytest.mark.parametrize("method", ["max", "mse"])
def test_a_calibrator_keeps_its_settings(method):
    model, given = Net(), batches()
    quantizer = model.layers[0]._input_quantizer
    own = HistogramCalibrator(num_bins=8192, skip_zeros=True)
    if method == "max":
        own = MaxCalibrator(track_amax=True, momentum=0.5)
    own.collect(torch.full((3,), 99.0))
    quantizer._calibrator = own
    with pytest.raises(ValueError, match="no batches"):
        calibrate(model, [], method, progress=False)
    assert quantizer._calibrator is own and own.seen == 3
    for _ in range(2):
        calibrate(model, given, method, progress=False)
        made = quantizer._calibrator
        assert made.seen == 5 * 12 and float(made.compute_amax("max")) < 99
        if method == "max":
            assert made._track_amax and len(made.amaxs) == 5 and made.momentum == 0.5
        else:
            assert made._num_bins == made.histogram.bins == 8192
            assert made._skip_zeros and made.histogram.skip_zeros
    compute_amax(model, "max")


def test_momentum_of_one_pass_is_not_that_of_the_next():
    model, given = Net(), batches()
    calibrate(model, given, "moving_max", progress=False)
    wanted = model.layers[0]._input_quantizer.amax.clone()
    calibrate(model, given, "moving_max", momentum=0.1, progress=False)
    assert model.layers[0]._input_quantizer.amax != wanted
    calibrate(model, given, "moving_max", progress=False)
    assert model.layers[0]._input_quantizer.amax == wanted


@pytest.mark.slow
def test_ten_thousand_batches_need_no_more_memory_than_a_few():
    with quant_modules.initialize():
        model = nn.Sequential(nn.Linear(4, 2))
    x, held = torch.randn(2, 4), []

    def given(count):
        for i in range(count):
            if i in (count // 10, count - 1):
                gc.collect()
                tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
                held.append((tensors, resident()))
            yield x

    calibrate(model, given(10_000), "mse", progress=False)
    (tensors, memory), (tensors_after, memory_after) = held
    # A leak would be one of 9,000 at least; caches of torch may grow by some.
    assert tensors_after - tensors < 500
    assert memory_after - memory < 2 * 2**20


def resident():
    """Bytes of memory of this process, or 0 where the system does not tell."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if told.exists() else 0
