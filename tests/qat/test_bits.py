"""Fewer bits step by step."""

import pytest
import torch
from qat_models import images, network, ranges
from torch import nn

from pytorch_quant import QuantDescriptor, TensorQuantizer, qat
from pytorch_quant.nn.modes import named_quantizers


def widths(model):
    return {q.num_bits for q in named_quantizers(model).values()}


def test_bits_fall_in_equal_shares():
    model = network()
    held = ranges(model)
    gradual = qat.gradual_bits(model, 8, 4, steps=10)
    assert widths(model) == {8}
    found = [gradual.step() for _ in range(12)]
    assert found == [8, 7, 7, 6, 6, 5, 5, 4, 4, 4, 4, 4] and widths(model) == {4}
    assert all(torch.equal(amax, held[name]) for name, amax in ranges(model).items())
    x = images()
    y = model[0]._input_quantizer(x)
    assert torch.equal(
        y, y.div(held["0._input_quantizer"] / 7).round() * (held["0._input_quantizer"] / 7)
    )


def test_bits_of_weights_alone_and_resumed():
    model = network()
    gradual = qat.gradual_bits(model, 6, 2, steps=5, activations=False)
    for _ in range(3):
        gradual.step()
    assert model[0]._weight_quantizer.num_bits == 3 and model[0]._input_quantizer.num_bits == 8
    other = network()
    again = qat.gradual_bits(other, 6, 2, steps=5, activations=False)
    again.load_state_dict(gradual.state_dict())
    assert other[0]._weight_quantizer.num_bits == again.bits == 3 and again.step() == 2
    longer = qat.gradual_bits(other, 6, 2, steps=9, activations=False)
    with pytest.raises(ValueError, match="gradual_bits with steps=5, this one has steps=9"):
        longer.load_state_dict(gradual.state_dict())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"start": 4, "end": 8, "steps": 2}, "start must be at least end"),
        ({"start": 8, "end": 1, "steps": 2}, "num_bits=1 is out of range"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bits_out_of_range(arguments, told):
    with pytest.raises(ValueError, match=told):
        qat.gradual_bits(network(), **arguments)


def test_bits_of_floating_point_formats():
    model = nn.Sequential(TensorQuantizer(QuantDescriptor((4, 3))))
    with pytest.raises(ValueError, match="floating-point formats only"):
        qat.gradual_bits(model, steps=3)
