from __future__ import annotations

import inspect

import numpy as np
import pytest
import reference
import torch
from torch import nn

from pytorch_quant import QuantDescriptor, TensorQuantizer
from pytorch_quant import nn as quant_nn
from pytorch_quant.calib import calibrate_weights
from pytorch_quant.optim import helper


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def names_of(group, net):
    by_id = {id(p): name for name, p in net.named_parameters()}
    return [by_id[id(p)] for p in group["params"]]


def test_match_parameters():
    net = model()
    found = helper.match_parameters(net, [r"bias", r"^0\."])
    assert inspect.isgenerator(found)
    pairs = list(found)
    assert [name for name, _ in pairs] == ["0.weight", "0.bias", "1.bias", "2.bias"]
    assert pairs[0][1] is net[0].weight
    assert list(helper.match_parameters(net, [])) == []
    assert list(helper.match_parameters(net, [r"absent"])) == []
    for bad in ("bias", [3], None):
        with pytest.raises(TypeError, match="list of patterns"):
            helper.match_parameters(net, bad)


def test_group_parameters():
    net = model()
    groups = helper.group_parameters(
        net, [["bias"], [r"^2\.", "bias"]], [0.1, 0.2], [0.8, 0.9], (1e-4, 0.0)
    )
    assert [names_of(g, net) for g in groups] == [
        ["0.bias", "1.bias", "2.bias"],
        ["2.weight"],
        ["0.weight", "1.weight"],
    ]
    settings = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    assert settings == [
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 1e-4},
        {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.0},
        {},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.7)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2, 0.5]
    assert [g["momentum"] for g in optimizer.param_groups] == [0.8, 0.9, 0.7]


def test_the_rest_may_be_empty_and_settings_are_optional():
    net = model()
    groups = helper.group_parameters(net, [[r"."]])
    assert [len(g["params"]) for g in groups] == [6, 0]
    assert all(set(g) == {"params"} for g in groups)
    torch.optim.SGD(groups, lr=0.1)
    assert names_of(helper.group_parameters(net, [])[0], net) == [
        n for n, _ in net.named_parameters()
    ]


def test_group_parameters_bad_input():
    net = model()
    for bad in ("bias", ["bias"], [["bias"], "weight"], [[1]], None, {"bias"}):
        with pytest.raises(TypeError, match="must be list of list of patterns"):
            helper.group_parameters(net, bad)
    for bad in ({"lrs": [0.1]}, {"momentums": [0.1] * 3}, {"weight_decays": []}, {"lrs": 0.1}):
        with pytest.raises(TypeError, match=f"{next(iter(bad))} must match"):
            helper.group_parameters(net, [["a"], ["b"]], **bad)


def test_freeze_parameters():
    net = model()
    helper.freeze_parameters(net, [r"^0\.", r"1\.weight"])
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["0.weight", "0.bias", "1.weight"]


def test_quant_weight_inplace():
    net = nn.Sequential(
        quant_nn.QuantConv2d(3, 4, 3),
        quant_nn.QuantConvTranspose2d(4, 3, 3),
        quant_nn.QuantLinear(3, 5, quant_desc_weight=QuantDescriptor(4)),
        nn.Linear(5, 5),
    )
    calibrate_weights(net[:2], "max")
    calibrate_weights(net[2], "max", perchannel=False)
    before = [layer.weight.detach().clone() for layer in net]
    expected = [
        reference.fake_quant(w.numpy(), reference.amax_of(w.numpy(), axis), bits)
        for w, axis, bits in zip(before, (0, 1, None), (8, 8, 4), strict=False)
    ]
    parameters = [layer.weight for layer in net]
    helper.quant_weight_inplace(net)
    for layer, parameter, y in zip(net, parameters, expected, strict=False):
        assert layer.weight is parameter
        assert parameter.requires_grad
        assert parameter.grad_fn is None
        np.testing.assert_allclose(parameter.detach().numpy(), y, rtol=0, atol=1e-6)
        assert layer._weight_quantizer.disabled
        assert not layer._input_quantizer.disabled
    assert len(net[2].weight.unique()) <= 16
    assert torch.equal(net[3].weight, before[3])
    # Again: nothing is left to do.
    after = [p.detach().clone() for p in parameters]
    helper.quant_weight_inplace(net)
    assert all(torch.equal(p, q) for p, q in zip(parameters, after, strict=True))


@pytest.mark.parametrize("kind", [quant_nn.QuantLinear, quant_nn.QuantLSTM, quant_nn.QuantGRUCell])
def test_the_outputs_stay_the_same(kind):
    options = {"num_layers": 2, "bidirectional": True} if kind is quant_nn.QuantLSTM else {}
    layer = kind(4, 3, **options).eval()
    calibrate_weights(layer, "percentile", percentile=90)
    x = torch.randn(5, 2, 4) if kind is not quant_nn.QuantGRUCell else torch.randn(5, 4)
    first = layer(x)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    helper.quant_weight_inplace(layer)
    second = layer(x)
    pairs = [(first, second)] if isinstance(first, torch.Tensor) else [(first[0], second[0])]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) == ("bias" in name)


def test_shared_quantizers_and_pre_quantization_scales():
    first, second = quant_nn.QuantLinear(4, 2), quant_nn.QuantLinear(4, 2)
    second._weight_quantizer = first._weight_quantizer
    net = nn.Sequential(first, second)
    calibrate_weights(net, "max")
    first._weight_quantizer.pre_quant_scale = torch.tensor([0.5, 1.0, 1.0, 0.25])
    x = torch.randn(3, 4)
    before = [layer(x) for layer in net]
    helper.quant_weight_inplace(net)
    for layer, y in zip(net, before, strict=True):
        torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


def test_quantizers_that_are_off_are_left():
    net = nn.Sequential(quant_nn.QuantLinear(4, 2), quant_nn.QuantLinear(2, 2))
    net[0]._weight_quantizer.disable()
    net[1]._weight_quantizer.disable_quant()
    before = [layer.weight.detach().clone() for layer in net]
    helper.quant_weight_inplace(net)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(net, before, strict=True))
    assert not net[1]._weight_quantizer.disabled


def test_a_weight_that_cannot_be_replaced_is_named():
    net = nn.Sequential(quant_nn.QuantLinear(4, 2), nn.Identity())
    net[1]._weight_quantizer = TensorQuantizer()
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"1\._weight_quantizer: Identity has no parameter"):
        helper.quant_weight_inplace(net)
    net[1]._weight_quantizer = TensorQuantizer(QuantDescriptor(fake_quant=False))
    with pytest.raises(ValueError, match=r"1\._weight_quantizer gives integer codes"):
        helper.quant_weight_inplace(net)
    assert torch.equal(net[0].weight, before)
    net[1]._weight_quantizer.disable()
    helper.quant_weight_inplace(net)
