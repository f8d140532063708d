"""Layers that become quantized in place, against the quantized layers themselves."""

import copy

import pytest
import torch
from hand_plans import rand
from torch import nn

from pytorch_quant import nn as quant_nn
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.swap import (
    QUANTIZED_LAYERS,
    operands_of,
    quantized_form,
    quantizers_of,
    swap_layer,
)

MAPS = {1: rand(2, 4, 9), 2: rand(2, 4, 9, 9), 3: rand(2, 4, 9, 9, 9)}
LAYERS = {
    "Linear": (lambda n: n.Linear(6, 3), rand(2, 6)),
    "LSTM": (lambda n: n.LSTM(6, 3, 2, bidirectional=True), rand(4, 2, 6)),
    "LSTMCell": (lambda n: n.LSTMCell(6, 3), rand(2, 6)),
    "GRU": (lambda n: n.GRU(6, 3), rand(4, 2, 6)),
    "GRUCell": (lambda n: n.GRUCell(6, 3), rand(2, 6)),
    "RNN": (lambda n: n.RNN(6, 3), rand(4, 2, 6)),
    "RNNCell": (lambda n: n.RNNCell(6, 3), rand(2, 6)),
}
for dims in (1, 2, 3):
    LAYERS[f"Conv{dims}d"] = (
        lambda n, d=dims: getattr(n, f"Conv{d}d")(4, 6, 3, padding=1, groups=2),
        MAPS[dims],
    )
    LAYERS[f"ConvTranspose{dims}d"] = (
        lambda n, d=dims: getattr(n, f"ConvTranspose{d}d")(4, 6, 3, stride=2),
        MAPS[dims],
    )
    for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "InstanceNorm"):
        LAYERS[f"{kind}{dims}d"] = (
            lambda n, k=kind, d=dims: getattr(n, f"{k}{d}d")(4 if k == "InstanceNorm" else 3),
            MAPS[dims],
        )


class QuantNames:
    """`quant_nn` under the names of torch."""

    def __getattr__(self, name):
        return getattr(quant_nn, f"Quant{name}")


def test_every_form_is_tried_here():
    assert {kind.__name__ for kind in QUANTIZED_LAYERS} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_swapped_layer_is_the_quantized_one(name):
    make, x = LAYERS[name]
    layer, built = make(nn), make(QuantNames())
    layer.note = note = object()
    parameters = list(layer.parameters())
    form = quantized_form(layer)
    descriptors = {"input": QuantDescriptor(8)}
    if "weight" in operands_of(layer):
        descriptors["weight"] = form.default_quant_desc_weight
        if "Transpose" in name:
            descriptors["weight"] = QuantDescriptor(8, axis=1)
    swap_layer(layer, descriptors)
    assert type(layer) is form is type(built) and layer.note is note
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert layer.__dict__.keys() - {"note", "_per_tensor_for_groups"} == built.__dict__.keys() - {
        "_per_tensor_for_groups"
    }
    built.load_state_dict(layer.state_dict())
    result, expected = layer(x), built(x)
    if isinstance(result, tuple):
        result, expected = result[0], expected[0]
    assert torch.equal(result, expected)
    assert torch.equal(first(copy.deepcopy(layer)(x)), first(result))


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", ["Linear", "LSTM"])
def test_an_operand_without_descriptor_stays_float(name):
    layer = LAYERS[name][0](nn).eval()
    swap_layer(layer, {"weight": QuantDescriptor(4, axis=0)})
    assert all(q.disabled for q in quantizers_of(layer, "input"))
    assert [q.num_bits for q in quantizers_of(layer, "weight") if not q.disabled]
    assert not any(module.training for module in layer.modules())


def test_only_exact_types_have_a_form():
    class Own(nn.Linear):
        pass

    assert quantized_form(Own(2, 2)) is None
    assert quantized_form(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is None
    with pytest.raises(ValueError, match="Own has no quantized form"):
        swap_layer(Own(2, 2), {})


def test_an_operand_that_the_layer_does_not_have():
    with pytest.raises(ValueError, match="AvgPool2d has no operand 'weight' to quantize, only in"):
        swap_layer(nn.AvgPool2d(2), {"weight": QuantDescriptor(8)})
