"""Ranges that follow the batches."""

import copy
import pickle

import numpy as np
import pytest
import torch
from qat_models import images, network, ranges
from torch.utils.checkpoint import checkpoint

from pytorch_quant import QuantDescriptor, TensorQuantizer, qat
from pytorch_quant import nn as quant_nn

INPUT = "0._input_quantizer"


def largest(x):
    return np.abs(x.numpy()).max()


def test_the_range_is_the_moving_average_of_the_maxima():
    model = network()
    wanted = ranges(model)[INPUT].item()
    held = ranges(model)
    qat.update_ranges(model, momentum=0.9)
    for i in range(5):
        x = images(seed=i) * (i + 1)
        model(x)
        wanted = 0.9 * wanted + 0.1 * largest(x)
        assert ranges(model)[INPUT].item() == pytest.approx(wanted, rel=1e-6)
    weights = {name for name in held if "weight" in name}
    assert all(torch.equal(ranges(model)[name], held[name]) for name in weights)
    # No longer in eval mode.
    now = ranges(model)
    model.eval()(images() * 100)
    assert torch.equal(ranges(model)[INPUT], now[INPUT])


def test_weights_follow_where_they_are_asked_to():
    model = network()
    qat.update_ranges(model, momentum=0.0, weights=True)
    with torch.no_grad():
        model[0].weight.mul_(3)
    model(images())
    wanted = np.abs(model[0].weight.detach().numpy()).max((1, 2, 3))
    np.testing.assert_array_equal(model[0]._weight_quantizer.amax.flatten(), wanted)
    assert model[0]._weight_quantizer.amax.shape == (4, 1, 1, 1)


def test_a_quantizer_without_a_range_starts_with_its_first_batch():
    model = network(calibrated=False)
    qat.update_ranges(model)
    model(images())
    assert model[0]._input_quantizer.amax == largest(images())
    assert model[0]._weight_quantizer.amax is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batches_that_are_not_finite_are_passed_over(bad):
    quantizer = TensorQuantizer(QuantDescriptor())
    quantizer.amax = 2.0
    qat.update_ranges(quantizer, momentum=0.5)
    quantizer(torch.tensor([bad, 1.0]))
    assert quantizer.amax == 2.0


@pytest.mark.parametrize("first", [0.0, float("nan")])
def test_a_first_batch_without_a_range_is_no_start(first):
    quantizer = TensorQuantizer(QuantDescriptor())
    qat.update_ranges(quantizer, momentum=0.99)
    quantizer(torch.full((2,), first))
    assert quantizer.amax == 0.0
    assert quantizer(torch.tensor([3.0, -1.0]))[0] == 3.0
    assert quantizer.amax == 3.0
    quantizer(torch.zeros(2))
    assert quantizer.amax == pytest.approx(0.99 * 3.0)


def test_per_channel_activations_and_blocks():
    quantizer = TensorQuantizer(QuantDescriptor(axis=1))
    quantizer.amax = torch.full((1, 3), 0.25)
    qat.update_ranges(quantizer, momentum=0.5)
    x = torch.randn(5, 3)
    quantizer(x)
    np.testing.assert_allclose(quantizer.amax[0], 0.125 + np.abs(x.numpy()).max(0) / 2, rtol=1e-6)
    layer = quant_nn.QuantLinear(8, 2, quant_desc_weight=QuantDescriptor(4, axis=-1, block_size=4))
    layer._weight_quantizer.amax = torch.ones(4)
    qat.update_ranges(layer, momentum=0.0, activations=False, weights=True)
    layer(torch.randn(2, 8))
    wanted = np.abs(layer.weight.detach().numpy()).reshape(4, 4).max(1)
    np.testing.assert_array_equal(layer._weight_quantizer.amax.flatten(), wanted)


def test_what_autograd_has_saved_does_not_move():
    """Two passes before one backward: each has the mask of its own range."""
    quantizer = TensorQuantizer(QuantDescriptor())
    quantizer.amax = 1.0
    qat.update_ranges(quantizer, momentum=0.0)
    x = torch.tensor([0.5, 2.0], requires_grad=True)
    first = quantizer(x[:1] * 1.0)
    (first.sum() + quantizer(x[1:] * 1.0).sum()).backward()
    assert x.grad.tolist() == [1, 1] and quantizer.amax == 2.0
    x = torch.tensor([3.0, 0.5], requires_grad=True)
    quantizer(x)
    y = quantizer(x * 1.0)
    quantizer(torch.tensor([0.1]))
    y.sum().backward()
    assert x.grad.tolist() == [1, 1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_does_not_count(reentrant):
    grads, found = [], []
    for checkpointed in (False, True):
        model = network()
        qat.update_ranges(model, momentum=0.5)
        x = (images(seed=3) * 2).requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        found.append(ranges(model))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_as_a_block_it_ends_and_the_ranges_stay():
    model = network()
    with qat.update_ranges(model, 0.5):
        model(images() * 3)
        inside = ranges(model)
    model(images() * 9)
    assert torch.equal(ranges(model)[INPUT], inside[INPUT])
    with pytest.raises(ZeroDivisionError), qat.update_ranges(model):
        raise ZeroDivisionError
    assert model[0]._input_quantizer._range_momentum is None


def test_freezing_stops_it_and_gives_it_back():
    model = network()
    qat.update_ranges(model, 0.5)
    held = ranges(model)
    with qat.freeze_ranges(model):
        model(images() * 3)
        assert torch.equal(ranges(model)[INPUT], held[INPUT])
    model(images() * 3)
    assert not torch.equal(ranges(model)[INPUT], held[INPUT])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_follow_too(copied):
    model = network()
    qat.update_ranges(model, 0.5)
    other = copied(model)
    held = ranges(model)
    other(images() * 3)
    assert not torch.equal(ranges(other)[INPUT], held[INPUT])
    assert torch.equal(ranges(model)[INPUT], held[INPUT])


def test_compiles_in_one_graph():
    model = network()
    qat.update_ranges(model, 0.5)
    wanted = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(3):
            y = compiled(images(seed=i) * (i + 1))
            torch.testing.assert_close(y, wanted(images(seed=i) * (i + 1)))
            y.sum().backward()
    for name, amax in ranges(wanted).items():
        torch.testing.assert_close(ranges(model)[name], amax)


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1"):
        qat.update_ranges(network(), momentum)


def test_learned_ranges_do_not_follow():
    model = network()
    qat.learn_ranges(model)
    with pytest.raises(ValueError, match="all ranges are learned"):
        qat.update_ranges(model)
