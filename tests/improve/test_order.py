"""Calls after one another: what is measured against, what is left alone, what stays usable."""

import copy

import pytest
import torch
from torch import nn

from pytorch_quant import (
    QuantDescriptor,
    adaround,
    bias_correction,
    calibrate,
    equalize_weights,
    smooth_quant,
)
from pytorch_quant.nn import QuantLinear
from pytorch_quant.nn.modes import named_quantizers


def network(bits=3):
    torch.manual_seed(0)
    low = {"quant_desc_weight": QuantDescriptor(bits, axis=0)}
    return nn.Sequential(
        QuantLinear(16, 32, **low), nn.ReLU(), QuantLinear(32, 4, bias=False, **low)
    )


def images():
    """One batch: with several, the correction of later layers is an estimate."""
    return [torch.randn(192, 16, generator=torch.Generator().manual_seed(1)) + 0.5]


@torch.no_grad()
def mean_error(model, batches, wanted):
    got = torch.cat([model(x) for x in batches]).double().mean(0)
    return float((got - wanted).abs().max())


@torch.no_grad()
def float_mean(model, batches):
    model = copy.deepcopy(model)
    for quantizer in named_quantizers(model).values():
        quantizer.disable()
    return torch.cat([model(x) for x in batches]).double().mean(0)


def correct(model, batches):
    return bias_correction(model, batches, progress=False)


def calibrated(bits=3):
    model, batches = network(bits), images()
    wanted = float_mean(model, batches)
    calibrate(model, batches, progress=False)
    return model, batches, wanted


def test_a_second_correction_changes_next_to_nothing():
    model, batches, wanted = calibrated()
    before = mean_error(model, batches, wanted)
    correct(model, batches)
    for again in (model, copy.deepcopy(model)):
        for _ in range(3):
            report = correct(again, batches)
            assert mean_error(again, batches, wanted) < before / 20
        assert all(row.largest_shift < before / 20 for row in report.layers)
        assert not any(row.bias_added for row in report.layers)


def test_a_correction_after_a_new_calibration_is_that_of_the_float_model():
    model, batches, wanted = calibrated()
    correct(model, batches)
    calibrate(model, [x / 3 for x in batches], progress=False)
    before = mean_error(model, batches, wanted)
    correct(model, batches)
    assert mean_error(model, batches, wanted) < before / 5


def test_a_parameter_that_has_changed_since_is_its_own_original():
    model, batches, _ = calibrated()
    correct(model, batches)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.bias += 1.0
    wanted = float_mean(model, batches)
    correct(model, batches)
    assert mean_error(model, batches, wanted) < 1e-2


def test_an_equalized_model_keeps_its_original_biases():
    model, batches, wanted = calibrated()
    correct(model, batches)
    assert equalize_weights(model, batches[0]).pairs
    calibrate(model, batches, progress=False)
    before = mean_error(model, batches, wanted)
    correct(model, batches)
    assert mean_error(model, batches, wanted) < before / 5


def test_after_adaround_the_correction_is_that_of_the_original_weights():
    model, batches, wanted = calibrated()
    adaround(model, batches, iterations=50, learning_rate=0.1, progress=False)
    assert model[0]._weight_quantizer.fixed
    before = mean_error(model, batches, wanted)
    correct(model, batches)
    after = mean_error(model, batches, wanted)
    assert before > 1e-3 and after < before / 5
    correct(model, batches)
    assert mean_error(model, batches, wanted) < before / 5


def test_layers_with_fixed_or_learned_weight_ranges_are_not_smoothed():
    model, batches, _ = calibrated()
    adaround(model, batches, iterations=20, progress=False, layers="0")
    model[2] = QuantLinear(32, 4, quant_desc_weight=QuantDescriptor(learn_amax=True))
    weights = [model[0].weight.clone(), model[2].weight.clone()]
    report = smooth_quant(model, batches, alpha=0.5, progress=False)
    assert not report.layers and "fixed" in report.skipped["0"] and "learned" in report.skipped["2"]
    assert torch.equal(model[0].weight, weights[0]) and torch.equal(model[2].weight, weights[1])


def test_a_model_improved_in_inference_mode_can_be_trained():
    model, batches = network(), images()
    with torch.inference_mode():
        equalize_weights(model, batches[0])
        smooth_quant(model, batches, alpha=0.5, progress=False)
        bias_correction(model, batches, progress=False)
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert model[2].bias.requires_grad
    model(batches[0]).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("improve", [smooth_quant, bias_correction, adaround])
@pytest.mark.parametrize(
    ("batches", "told"),
    [
        (None, "batches is None"),
        (5, "batches is 5"),
        (torch.ones(2, 16), r"one tensor of shape \(2, 16\)"),
        ({"x": torch.ones(2, 16)}, "a dict"),
    ],
)
def test_what_is_no_iterable_of_batches_is_refused(improve, batches, told):
    model, _, _ = calibrated()
    with pytest.raises(TypeError, match=f"{told}; pass an iterable of batches"):
        improve(model, batches, progress=False)
