"""Quantization dropout: activations that stay float at random."""

import copy
import pickle

import pytest
import torch
from qat_models import images, network
from torch import nn

from pytorch_quant import QuantDescriptor, TensorQuantizer, qat


@pytest.mark.parametrize("p", [0.25, 0.5, 1.0])
def test_values_stay_float_with_probability_p(p):
    quantizer = TensorQuantizer(QuantDescriptor(4))
    quantizer.amax = 1.0
    x = torch.rand(20000) * 2 - 1
    y = quantizer(x)
    # QDrop, eq. 5, and the gradient that follows from it.
    qat.quantization_dropout(nn.Sequential(quantizer), p)
    mixed = quantizer(x)
    stays, rounds = mixed == x, mixed == y
    assert (stays | rounds).all()
    assert stays.float().mean().item() == pytest.approx(p, abs=0.02)
    big = torch.full((20000,), 2.0, requires_grad=True)
    quantizer(big).sum().backward()
    assert big.grad.mean().item() == pytest.approx(p, abs=0.02)
    assert torch.equal(quantizer.eval()(x), y)


def test_dropout_ends_is_replaced_and_copied():
    model = network()
    x = images()
    wanted = model.eval()(x)
    model.train()
    qat.quantization_dropout(model, 0.9)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other[0]._input_quantizer._forward_hooks) == 1
        assert not torch.equal(other[0]._input_quantizer(x), other[0]._input_quantizer.eval()(x))
    with qat.quantization_dropout(model, 0.2):
        (hook,) = model[0]._input_quantizer._forward_hooks.values()
        assert hook.p == 0.2
        assert not model[0]._weight_quantizer._forward_hooks
    assert not model[0]._input_quantizer._forward_hooks
    assert torch.equal(model.eval()(x), wanted)
    with pytest.raises(ValueError, match="p must be from 0 to 1"):
        qat.quantization_dropout(model, 1.5)


def test_dropout_keeps_the_pre_quantization_scale_and_leaves_disabled_quantizers():
    quantizer = TensorQuantizer(QuantDescriptor())
    quantizer.amax = 1.0
    quantizer.pre_quant_scale = 0.5
    qat.quantization_dropout(quantizer, 1.0)
    assert quantizer(torch.tensor([0.3])).item() == pytest.approx(0.15)
    quantizer.disable()
    assert quantizer(torch.tensor([0.3])).item() == pytest.approx(0.15)
