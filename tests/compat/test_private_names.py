"""Private names that existing programs reach for."""

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("name", ["QuantConv2d", "QuantConvTranspose2d"])
def test_forwards_of_their_own_start_with_quant(old, name):
    layer, x = getattr(old.nn, name)(3, 4, 3), torch.randn(1, 3, 8, 8)
    expected = layer(x)
    quant_input, quant_weight = layer._quant(x)
    convolve = F.conv2d if name == "QuantConv2d" else F.conv_transpose2d
    assert torch.equal(convolve(quant_input, quant_weight, layer.bias), expected)


def test_bases_of_the_convolutions(old):
    from pytorch_quantization.nn.modules.quant_conv import _QuantConvNd, _QuantConvTransposeNd
    from pytorch_quantization.nn.modules.quant_rnn import QuantRNN

    assert isinstance(old.nn.QuantConv3d(1, 1, 1), _QuantConvNd)
    assert isinstance(old.nn.QuantConvTranspose1d(1, 1, 1), _QuantConvTransposeNd)
    assert QuantRNN is old.nn.QuantRNN


def test_modules_hold_what_they_import(old):
    from pytorch_quantization.nn.modules._utils import QuantDescriptor, TensorQuantizer

    assert TensorQuantizer is old.nn.TensorQuantizer
    assert QuantDescriptor is old.tensor_quant.QuantDescriptor


def test_fields_of_a_descriptor(old):
    desc = old.tensor_quant.QuantDescriptor(num_bits=4, axis=(0))
    assert (desc._num_bits, desc._axis, desc._amax) == (4, 0, None)
    with pytest.raises(AttributeError, match="has no field '_bits'"):
        _ = desc._bits


def test_histograms_edited_by_hand(old):
    calibrator = old.calib.HistogramCalibrator(8, None, False)
    with pytest.raises(ValueError, match="collect a batch first"):
        calibrator._calib_hist = torch.ones(2048)
    calibrator.collect(torch.tensor([0.5, 3.0]))
    # As programs that sum over processes do.
    calibrator._calib_hist = calibrator._calib_hist * 2.0
    assert int(calibrator._calib_hist.sum()) == 4 and calibrator.compute_amax("max") == 3.0
    calibrator._calib_bin_edges = calibrator._calib_bin_edges / 2
    assert calibrator.compute_amax("max") == pytest.approx(1.5, abs=2 / 2048)
    with pytest.raises(ValueError, match="keep the number of bins"):
        calibrator._calib_hist = torch.ones(3)
    calibrator._calib_hist = None
    assert calibrator._calib_hist is None and calibrator.compute_amax("mse") is None


def test_maxbound(old):
    assert old.nn.TensorQuantizer().maxbound == 127
