"""Options and batches of calibrate: what is accepted, and what is refused with what advice."""

import numpy as np
import pytest
import torch
from torch import nn

from pytorch_quant import calibrate, compute_amax, quant_modules
from pytorch_quant.calib import HistogramCalibrator, calibrate_weights


def network():
    with quant_modules.initialize():
        return nn.Sequential(nn.Linear(4, 2))


@pytest.mark.parametrize("percentile", [-1, 101, 500, float("nan")])
def test_a_percentile_out_of_range_is_refused_by_every_method(percentile):
    told = "percentile=.* is out of range"
    for method in ("max", "percentile", "mse"):
        with pytest.raises(ValueError, match=told):
            calibrate_weights(network(), method, percentile=percentile)
    calibrator = HistogramCalibrator()
    for _ in range(2):
        for method in ("max", "mse", "percentile"):
            with pytest.raises(ValueError, match=told):
                calibrator.compute_amax(method, percentile=percentile)
        calibrator.collect(torch.ones(3))
    quantizer = network()[0]._input_quantizer
    quantizer._calibrator = calibrator
    with pytest.raises(ValueError, match=told):
        quantizer.load_calib_amax("mse", percentile=percentile)


@pytest.mark.parametrize("percentile", ["99", None, True])
def test_a_percentile_that_is_no_number(percentile):
    for call in (
        lambda: calibrate_weights(network(), "percentile", percentile=percentile),
        lambda: HistogramCalibrator().compute_amax("percentile", percentile=percentile),
    ):
        with pytest.raises(TypeError, match="is no number"):
            call()
    with pytest.raises(ValueError, match="use a number from 0 to 100"):
        calibrate(network(), [torch.ones(1, 4)], "percentile", percentile=percentile)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("percentile", {"percentile": np.float32(99)}),
        ("lp", {"p": np.float32(3), "stride": np.int64(3), "start_bin": np.uint8(100)}),
        ("moving_max", {"momentum": np.float64(0.5)}),
        ("best", {"sample_batches": np.int64(2)}),
    ],
)
def test_numpy_scalars_are_numbers(method, options):
    x, plain = torch.randn(50, 4), {name: value.item() for name, value in options.items()}
    found = []
    for given in (options, plain):
        model = network()
        calibrate(model, [x, x * 2], method, progress=False, **given)
        found.append(float(model[0]._input_quantizer.amax))
    assert found[0] == found[1]
    for wrong in ({"start_bin": np.float32(3)}, {"p": np.bool_(True)}):
        with pytest.raises(ValueError, match="out of range"):
            compute_amax(model, "lp", **wrong)


@pytest.mark.parametrize("batches", [None, 5])
def test_batches_that_are_none(batches):
    with pytest.raises(TypeError, match=rf"batches is {batches} of type \w+; pass an iterable"):
        calibrate(network(), batches, progress=False)


@pytest.mark.parametrize("batch", [np.ones((2, 4)), (np.ones((2, 4)), 1), {"input": np.ones(4)}])
def test_numpy_batches(batch):
    with pytest.raises(TypeError, match=r"torch\.from_numpy"):
        calibrate(network(), [batch], progress=False)


class Endless:
    """As a streaming data set: it has a length in name only."""

    def __len__(self):
        raise NotImplementedError

    def __iter__(self):
        yield from (torch.ones(1, 4), torch.ones(1, 4))


@pytest.mark.parametrize("progress", [False, True])
def test_a_loader_without_a_length(progress):
    assert calibrate(network(), Endless(), progress=progress).batches == 2


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = network()

    def forward(self, x):
        return self.layer(x)


def test_pairs_for_a_compiled_model():
    model = torch.compile(Single(), backend="eager")
    calibrate(model, [(torch.full((1, 4), 3.0), torch.zeros(1))], progress=False)
    assert model._orig_mod.layer[0]._input_quantizer.amax == 3
