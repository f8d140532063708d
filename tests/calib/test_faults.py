"""Bad batches on an accelerator: no reading back while batches run, one report at the end."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytorch_quant import CalibrationError, calibrate, compute_amax, quant_modules
from pytorch_quant.calib import HistogramCalibrator, MaxCalibrator, observation
from pytorch_quant.ptq.storage import save_calibration


@pytest.fixture
def deferred(monkeypatch):
    monkeypatch.setattr(observation, "HOST_TYPES", ())


class Twice(nn.Module):
    """The first layer runs twice in a batch; of the other, the batch may spoil the input."""

    def __init__(self):
        super().__init__()
        with quant_modules.initialize():
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, second=1.0, third=1.0):
        y = self.first(self.first(x))
        return self.third(self.second(y * second) * third)


def batch(**factors):
    return {"x": torch.randn(3, 4), **factors}


NAN = float("nan")


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("method", ["max", "mse", "best"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        # A bad tensor spoils the later layers too.
        ([{}, {}, {"x": torch.full((3, 4), NAN)}], r"first\._input_quantizer: NaN.* batch 2 "),
        ([{}, {"second": NAN}, {}], r"second\._input_quantizer: NaN.* in batch 1 "),
        # The earlier batch, though the quantizer is a later one.
        ([{}, {"third": NAN}, {"second": NAN}], r"third\._input_quantizer: NaN.* in batch 1 "),
    ],
)
def test_the_earliest_bad_batch_and_the_first_quantizer_are_named(method, bad, message):
    model = Twice()
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, [batch(), *(batch() | b for b in bad[1:])], method, progress=False)
    # It was told once, for all of them.
    compute_amax(model, "max")


@pytest.mark.usefixtures("deferred")
def test_batches_are_those_of_the_pass_also_when_it_accumulates():
    model = Twice()
    calibrate(model, [batch(), batch()], "mse", progress=False)
    with pytest.raises(CalibrationError, match=r"second\._input_quantizer.* in batch 1 "):
        bad = [batch(), batch(second=NAN)]
        calibrate(model, bad, "mse", progress=False, accumulate=True)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("method", ["max", "mse"])
def test_no_quantizer_counts_what_comes_after_the_bad_batch(method):
    model = Twice()
    given = [batch(), batch(third=NAN), batch(), batch()]
    with pytest.raises(CalibrationError):
        calibrate(model, given, method, progress=False)
    seen = {
        n: m._calibrator.seen for n, m in model.named_modules() if n.endswith("_input_quantizer")
    }
    # In the bad batch the tensors before the bad one count.
    assert list(seen.values()) == [48, 24, 12]


@pytest.mark.usefixtures("deferred")
def test_an_interrupted_pass_with_a_bad_batch(tmp_path):
    def interrupted():
        yield from (batch(), batch(second=NAN))
        raise KeyboardInterrupt

    model = Twice()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, interrupted(), "mse", progress=False)
        with pytest.raises(CalibrationError, match=r"second\._input_quantizer: NaN.* in batch 1 "):
            save_calibration(model, tmp_path / "held")
        save_calibration(model, tmp_path / "held")
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, interrupted(), "mse", progress=False)
    # Before any batch: a batch that cannot count is not run.
    with pytest.raises(CalibrationError, match=r"second\._input_quantizer: NaN.* in batch 1 "):
        calibrate(model, iter(()), "mse", progress=False, accumulate=True)


class NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read back")
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("axis", [None, 0])
def test_maxima_read_nothing_back(axis, device):
    calibrator = MaxCalibrator(8, axis, True, track_amax=True)
    x = torch.rand(3, 4, device=device)
    with NoReading():
        for value in (x, x * 2, -x, x):
            calibrator.collect(value)
    with pytest.raises(CalibrationError, match="batch 2 "):
        calibrator.compute_amax()
    assert calibrator.seen == 24


@pytest.mark.parametrize("kind", [MaxCalibrator, HistogramCalibrator])
@pytest.mark.parametrize("axis", [None, 0])
def test_a_device_that_cannot_be_read(kind, axis):
    """A meta tensor has no values: reading any raises."""
    calibrator = kind(8, axis, True)
    for _ in range(3):
        calibrator.collect(torch.rand(3, 4, device="meta"))
    assert calibrator.amax_shape == (() if axis is None else (3, 1))


def test_float64_beyond_float32_counts_as_infinite():
    for kind in (MaxCalibrator, HistogramCalibrator):
        with pytest.raises(CalibrationError, match="NaN or Inf in 2 of 4 values"):
            kind().collect(torch.tensor([1.0, 1e300, -1e300, 2.0], dtype=torch.float64))
