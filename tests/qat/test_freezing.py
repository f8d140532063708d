"""Freezing ranges and batch norm, and undoing it."""

import torch
from qat_models import network, ranges, train
from torch import nn

from pytorch_quant import qat

INPUT = "0._input_quantizer"


def test_frozen_learned_ranges_stay_whatever_the_optimizer_remembers():
    model = network()
    qat.learn_ranges(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer)
    held = ranges(model)
    with qat.freeze_ranges(model):
        train(model, optimizer)
        assert all(torch.equal(amax, held[name]) for name, amax in ranges(model).items())
    train(model, optimizer)
    assert not torch.equal(ranges(model)[INPUT], held[INPUT])


def test_unfreeze_undoes_both_kinds():
    model = network()
    qat.learn_ranges(model)
    qat.freeze_batchnorm(qat.unfreeze(model))
    qat.freeze_ranges(model)
    mean = model[1].running_mean.clone()
    train(model, torch.optim.SGD([model[0].weight], lr=0.0))
    assert torch.equal(model[1].running_mean, mean) and not model[1].training
    assert qat.unfreeze(model) is model
    assert type(model[1]) is nn.BatchNorm2d and model[1].training
    assert all(p.requires_grad for p in qat.range_parameters(model).values())
    train(model, torch.optim.SGD([model[0].weight], lr=0.0))
    assert not torch.equal(model[1].running_mean, mean)
    qat.freeze_batchnorm(model.eval())
    assert not qat.unfreeze(model)[1].training
