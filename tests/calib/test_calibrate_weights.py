from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pytorch_quant import QuantDescriptor, TensorQuantizer
from pytorch_quant import nn as quant_nn
from pytorch_quant.calib import CalibrationError, calibrate_weights
from pytorch_quant.nn import QuantMixin

METHODS = ("max", "percentile", "mse", "entropy")
PER_TENSOR = QuantDescriptor(8)


def heavy_tailed(layer):
    """Weights with outliers, different in every channel, so that the methods differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                normal = torch.randn(parameter.shape, generator=generator)
                scale = torch.rand(len(parameter), *[1] * (parameter.dim() - 1)) + 0.5
                parameter.copy_(normal**3 * scale)
    return layer


def layers():
    desc = {"quant_desc_weight": PER_TENSOR}
    return {
        "conv": (quant_nn.QuantConv2d(3, 4, 3), 0),
        "conv1d": (quant_nn.QuantConv1d(3, 4, 3), 0),
        "linear": (quant_nn.QuantLinear(50, 6), 0),
        "transposed": (quant_nn.QuantConvTranspose2d(3, 4, 3), 1),
        "linear per tensor": (quant_nn.QuantLinear(50, 6, **desc), 0),
        "conv per tensor": (quant_nn.QuantConv2d(3, 4, 3, **desc), 0),
        "transposed per tensor": (quant_nn.QuantConvTranspose1d(3, 4, 9, **desc), 1),
        "by column": (quant_nn.QuantLinear(6, 50, quant_desc_weight=QuantDescriptor(axis=1)), 1),
        "cell": (quant_nn.QuantLSTMCell(5, 3), 0),
    }


def weight_of(layer):
    if isinstance(layer, nn.LSTMCell):
        return torch.cat([layer.weight_ih, layer.weight_hh], 1).detach().numpy()
    return layer.weight.detach().numpy()


def rows_of(weight, axis):
    return np.moveaxis(np.abs(weight), axis, 0).reshape(weight.shape[axis], -1)


@pytest.mark.parametrize("name", layers())
def test_max(name):
    layer, axis = layers()[name]
    heavy_tailed(layer)
    calibrate_weights(layer, "max")
    quantizer = layer._weight_quantizer
    weight = weight_of(layer)
    others = tuple(a for a in range(weight.ndim) if a != axis)
    expected = np.abs(weight).max(others, keepdims=True)
    assert quantizer.axis == axis
    assert quantizer.amax.shape == expected.shape
    np.testing.assert_array_equal(quantizer.amax.numpy(), expected)
    calibrate_weights(layer, "max", perchannel=False)
    assert quantizer.axis is None
    assert quantizer.amax.shape == ()
    assert float(quantizer.amax) == np.abs(weight).max()


@pytest.mark.parametrize("perchannel", [True, False])
@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.99])
@pytest.mark.parametrize("num_bins", [512, 2048])
def test_percentile(perchannel, percentile, num_bins):
    layer = heavy_tailed(quant_nn.QuantConv2d(16, 5, 9))
    calibrate_weights(layer, "percentile", perchannel, percentile, num_bins)
    weight = weight_of(layer)
    rows = rows_of(weight, 0) if perchannel else np.abs(weight).reshape(1, -1)
    amax = layer._weight_quantizer.amax.numpy().ravel()
    assert len(amax) == len(rows)
    for row, value in zip(np.sort(rows), amax, strict=True):
        # The histogram ranges to the next power of two, and the answer lies in the right bin.
        width = 2.0 ** (np.floor(np.log2(row[-1])) + 1) / num_bins
        exact = row[max(int(np.ceil(percentile / 100 * len(row))), 1) - 1]
        assert abs(value - exact) <= width


def test_the_default_is_percentile_per_channel():
    first, second = (heavy_tailed(quant_nn.QuantLinear(20000, 3)) for _ in range(2))
    second.load_state_dict(first.state_dict(), strict=False)
    calibrate_weights(first)
    calibrate_weights(second, "percentile", True, 99.99, 2048)
    assert torch.equal(first._weight_quantizer.amax, second._weight_quantizer.amax)
    assert first._weight_quantizer.amax.shape == (3, 1)
    assert bool((first._weight_quantizer.amax[:, 0] < first.weight.abs().amax(1)).all())


def squared_error(row, amax):
    scale = amax / 127
    y = np.clip(np.rint(row / scale), -128, 127) * scale
    return np.square(y - row).sum()


@pytest.mark.parametrize("perchannel", [True, False])
def test_mse_is_near_the_best_amax(perchannel):
    layer = heavy_tailed(quant_nn.QuantLinear(3000, 3))
    calibrate_weights(layer, "mse", perchannel)
    weight = weight_of(layer)
    rows = rows_of(weight, 0) if perchannel else np.abs(weight).reshape(1, -1)
    for row, amax in zip(rows, layer._weight_quantizer.amax.numpy().ravel(), strict=True):
        best = min(squared_error(row, a) for a in np.linspace(0.05, 1, 400) * row.max())
        assert squared_error(row, amax) <= 1.02 * best
        assert amax < row.max()


def test_entropy_clips_a_lone_outlier():
    layer = quant_nn.QuantLinear(20000, 2)
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight[0, 0] = 40.0
        layer.weight[1, 0] = -30.0
    calibrate_weights(layer, "entropy")
    amax = layer._weight_quantizer.amax.flatten()
    assert bool(((amax > 3) & (amax < 10)).all())
    calibrate_weights(layer, "entropy", perchannel=False)
    assert 3 < layer._weight_quantizer.amax.item() < 10


@pytest.mark.parametrize("method", METHODS)
def test_every_quantizer_of_a_model_gets_an_amax(method):
    model = nn.ModuleDict(
        {"a": quant_nn.QuantConv2d(3, 4, 3), "b": nn.Sequential(quant_nn.QuantLinear(5, 2))}
    )
    model["r"] = quant_nn.QuantLSTM(4, 3, num_layers=2, bidirectional=True)
    model["b"][0]._weight_quantizer.disable()
    calibrate_weights(model, method)
    assert model["a"]._weight_quantizer.amax.shape == (4, 1, 1, 1)
    assert model["b"][0]._weight_quantizer.amax.shape == (2, 1)
    assert [q.amax.shape for q in model["r"]._weight_quantizers] == [(12, 1)] * 4
    assert not hasattr(model["a"]._input_quantizer, "_amax")
    assert model["b"][0]._weight_quantizer.disabled


def test_lstm_weights_are_ranged_as_they_are_seen():
    layer = quant_nn.QuantLSTM(4, 3, num_layers=1)
    calibrate_weights(layer, "max")
    both = np.concatenate([layer.weight_ih_l0.detach(), layer.weight_hh_l0.detach()], 1)
    expected = np.abs(both).max(1, keepdims=True)
    np.testing.assert_array_equal(layer._weight_quantizers[0].amax.numpy(), expected)


class Custom(nn.Module, QuantMixin):
    def __init__(self, weight):
        super().__init__()
        if weight is not None:
            self.weight = nn.Parameter(weight)
        self.init_quantizer(PER_TENSOR, PER_TENSOR)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
        self._weight_quantizer = TensorQuantizer(PER_TENSOR)


def test_custom_layers():
    custom, plain = Custom(torch.tensor([[4.0], [-5.0]])), Plain()
    calibrate_weights(nn.Sequential(custom, plain, nn.Linear(2, 2)), "max")
    assert custom._weight_quantizer.amax.tolist() == [[4.0], [5.0]]
    assert plain._weight_quantizer.amax.tolist() == [[3.0], [2.0]]


def test_a_weight_of_no_dimension_is_per_tensor():
    custom = Custom(torch.tensor(-2.0))
    calibrate_weights(custom, "max")
    assert custom._weight_quantizer.amax.tolist() == 2
    assert custom._weight_quantizer.axis is None


def test_a_layer_without_a_weight_is_named():
    model = nn.Sequential(Plain(), Custom(None))
    with pytest.warns(UserWarning, match=r"1 weight quantizer.*1\._weight_quantizer"):
        calibrate_weights(model, "max")
    assert model[0]._weight_quantizer.amax.shape == (2, 1)
    assert model[1]._weight_quantizer.amax is None


def test_what_stands_in_for_a_quantizer_is_left_out():
    plain, layer = Plain(), quant_nn.QuantLinear(2, 2)
    layer._weight_quantizer = nn.Identity()
    calibrate_weights(nn.Sequential(plain, layer), "max")
    assert plain._weight_quantizer.amax is not None


def test_grouped_transposed_convolutions_stay_per_tensor():
    layer = quant_nn.QuantConvTranspose2d(4, 4, 3, groups=2)
    calibrate_weights(layer, "max")
    assert layer._weight_quantizer.axis is None
    assert torch.equal(layer._weight_quantizer.amax, layer.weight.abs().max())


def test_a_learned_range_stays_per_tensor_and_starts_at_the_amax():
    desc = QuantDescriptor(learn_amax=True)
    layer = quant_nn.QuantLinear(5, 3, quant_desc_weight=desc)
    calibrate_weights(layer, "max")
    assert layer._weight_quantizer.axis is None
    assert torch.equal(layer._weight_quantizer.clip.clip_value_max, layer.weight.abs().max())


@pytest.mark.parametrize("perchannel", [True, False])
def test_blocks_stay_blocks(perchannel):
    desc = QuantDescriptor(4, axis=1, block_size=4)
    layer = quant_nn.QuantLinear(8, 3, quant_desc_weight=desc)
    calibrate_weights(layer, "max", perchannel)
    expected = np.abs(layer.weight.detach().numpy()).reshape(3, 2, 4).max(2)
    np.testing.assert_array_equal(
        layer._weight_quantizer.amax.flatten().numpy(), expected.flatten()
    )


def test_fixed_and_dynamic_quantizers_are_left():
    fixed = quant_nn.QuantLinear(5, 3, quant_desc_weight=QuantDescriptor(amax=7.0))
    dynamic = quant_nn.QuantLinear(5, 3, quant_desc_weight=QuantDescriptor(dynamic=True))
    calibrate_weights(nn.Sequential(fixed, dynamic), "max")
    assert fixed._weight_quantizer.amax.tolist() == 7
    assert fixed._weight_quantizer.axis is None
    assert dynamic._weight_quantizer.amax is None


def test_layers_that_share_a_quantizer_share_the_amax():
    first, second = quant_nn.QuantLinear(5, 3), quant_nn.QuantLinear(9, 3)
    second._weight_quantizer = first._weight_quantizer
    calibrate_weights(nn.Sequential(first, second), "max")
    expected = np.abs(np.concatenate([first.weight.detach(), second.weight.detach()], 1))
    np.testing.assert_array_equal(
        first._weight_quantizer.amax.numpy(), expected.max(1, keepdims=True)
    )
    third = quant_nn.QuantLinear(5, 4)
    third._weight_quantizer = first._weight_quantizer
    with pytest.raises(RuntimeError, match=r"0\._weight_quantizer: .*changed"):
        calibrate_weights(nn.Sequential(first, third), "max")


@pytest.mark.parametrize("calib_method", ["max", "histogram"])
def test_the_calibrator_of_the_quantizer_is_left_and_fits_the_new_axis(calib_method):
    layer = Plain()
    quantizer = TensorQuantizer(QuantDescriptor(8, calib_method=calib_method))
    layer._weight_quantizer, calibrator = quantizer, quantizer._calibrator
    calibrate_weights(layer, "mse")
    assert quantizer._calibrator is calibrator
    assert calibrator.compute_amax("max") is None
    quantizer.collect(layer.weight)
    quantizer.load_calib_amax("max")
    assert quantizer.amax.shape == (2, 1)


def test_the_pre_quantization_scale_counts():
    layer = Plain()
    layer._weight_quantizer.pre_quant_scale = torch.tensor([2.0, 1.0])
    calibrate_weights(layer, "max")
    assert layer._weight_quantizer.amax.tolist() == [[3.0], [4.0]]


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zeros(method):
    layer = quant_nn.QuantLinear(5, 3)
    nn.init.zeros_(layer.weight)
    calibrate_weights(layer, method)
    assert layer._weight_quantizer.amax.tolist() == [[0.0]] * 3


def test_the_weights_stay_as_they_are():
    layer = quant_nn.QuantConv2d(3, 4, 3)
    before = copy.deepcopy(layer)
    calibrate_weights(layer, "entropy")
    assert torch.equal(layer.weight, before.weight)
    assert layer.weight.requires_grad
    assert layer._weight_quantizer.amax.requires_grad is False


def test_bad_input():
    model = nn.Sequential(quant_nn.QuantLinear(5, 3), quant_nn.QuantLinear(3, 2))
    with pytest.raises(ValueError, match=r"'median'; use one of max, percentile, mse, entropy"):
        calibrate_weights(model, "median")
    with pytest.raises(ValueError, match=r"no weight quantizer"):
        calibrate_weights(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"percentile=101 is out of range"):
        calibrate_weights(model, "percentile", percentile=101)
    with pytest.raises(ValueError, match=r"bins=0 is out of range"):
        calibrate_weights(model, "mse", num_bins=0)
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    calibrator = model[1]._weight_quantizer._calibrator
    with pytest.raises(CalibrationError, match=r"^1\._weight_quantizer: NaN or Inf"):
        calibrate_weights(model, "max")
    assert model[0]._weight_quantizer.amax is None
    assert model[1]._weight_quantizer._calibrator is calibrator
    lost = quant_nn.QuantLinear(5, 3, quant_desc_weight=QuantDescriptor(axis=2))
    with pytest.raises(ValueError, match=r"_weight_quantizer: axis 2 is out of range"):
        calibrate_weights(lost, "max")
