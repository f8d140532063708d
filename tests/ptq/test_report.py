"""What the report says of a calibration, against NumPy on the values themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from pytorch_quant import QuantDescriptor, calibrate
from pytorch_quant import nn as quant_nn


def calibrated(method, axis=None, scale_amax=None, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator) * torch.tensor([1.0, 4.0, 0.3])
    desc = QuantDescriptor(num_bits=4, axis=axis, scale_amax=scale_amax)
    layer = quant_nn.QuantLinear(3, 2, quant_desc_input=desc)
    report = calibrate(nn.Sequential(layer), [x], method, progress=False, **options)
    row = next(row for row in report.ranges if "_input_" in row.name)
    reach = layer._input_quantizer.amax.numpy() * (scale_amax or 1.0)
    return row.clipped, (np.abs(x.numpy()) > reach).mean()


@pytest.mark.parametrize("scale_amax", [None, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize(
    ("method", "options"), [("percentile", {"percentile": 97.0}), ("mse", {}), ("entropy", {})]
)
def test_the_share_clipped_is_what_numpy_counts(method, options, axis, scale_amax):
    clipped, counted = calibrated(method, axis, scale_amax, **options)
    # Half a bin of 2048 holds this share of the values at most.
    assert clipped == pytest.approx(counted, abs=1e-3)
    assert scale_amax == 2.0 or counted > 0


def test_maxima_clip_nothing_unless_they_are_scaled_down():
    assert calibrated("max")[0] == calibrated("max", 1, 1.5)[0] == 0
    assert calibrated("max", scale_amax=0.5)[0] is None
    assert calibrated("mean_max", scale_amax=0.5)[0] is None
