"""Habits 12 to 14 of existing programs: constructors, mixins, amax tensors."""

import copy
import inspect

import numpy as np
import pytest
import reference
import torch
from old_programs import quantizers, tutorial_loop
from torch import nn

CONV = "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode"
TRANSPOSE = (
    "in_channels out_channels kernel_size stride padding output_padding groups bias dilation "
    "padding_mode"
)
PARAMETERS = {
    "Conv": CONV,
    "ConvTranspose": TRANSPOSE,
    "MaxPool": "kernel_size stride padding dilation return_indices ceil_mode",
    "AdaptiveAvgPool": "output_size",
    "InstanceNorm": "num_features eps momentum affine track_running_stats",
}
NAMED = {f"Quant{kind}{d}d": names for kind, names in PARAMETERS.items() for d in (1, 2, 3)}
NAMED["QuantLinear"] = "in_features out_features bias"
NAMED["QuantAvgPool1d"] = "kernel_size stride padding ceil_mode count_include_pad"
NAMED["QuantAvgPool2d"] = NAMED["QuantAvgPool1d"] + " divisor_override"


@pytest.mark.parametrize("name", NAMED)
def test_12_signatures(old, name):
    cls = getattr(old.nn, name)
    kinds = inspect.signature(cls.__init__).parameters
    assert [n for n, p in kinds.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        "self",
        *NAMED[name].split(),
    ]
    assert [n for n, p in kinds.items() if p.kind is not p.POSITIONAL_OR_KEYWORD] == ["kwargs"]
    layer = getattr(nn, name.removeprefix("Quant"))
    arguments = (2, 3, 3) if "Conv" in name else (2, 3) if name == "QuantLinear" else (2,)
    float_layer = layer(*arguments)
    assert all(hasattr(float_layer, parameter) for parameter in NAMED[name].split())
    cls.from_float = classmethod(lambda cls, module: cls)
    assert cls.from_float(float_layer) is cls
    del cls.from_float


def test_13_init_again(old):
    class Again(nn.Module, old.mixins.QuantInputMixin):
        def __init__(self):
            nn.Module.__init__(self)
            old.mixins.QuantInputMixin.__init__(self)
            self.init_quantizer(old.tensor_quant.QUANT_DESC_8BIT_PER_TENSOR)

    made = Again.__new__(Again)
    made.__init__()
    first = made._input_quantizer
    made.__init__()
    assert made._input_quantizer is not first and len(list(made.children())) == 1


def test_13_mixin_without_a_quantizer(old):
    class Bare(nn.Module, old.mixins.QuantInputMixin):
        def forward(self, x):
            return x

    model = nn.Sequential(Bare(), old.nn.QuantLinear(3, 2))
    tutorial_loop(old, model, [torch.randn(4, 3)])
    assert len(quantizers(old, copy.deepcopy(model))) == 2
    assert "Bare" in repr(model) and not hasattr(model[0], "_input_quantizer")
    pop = old.mixins.pop_quant_desc_in_kwargs
    assert pop(Bare) == (Bare.default_quant_desc_input, None)
    desc = old.tensor_quant.QuantDescriptor(num_bits=4)
    assert pop(Bare, input_only=True, quant_desc_input=desc) is desc


def test_14_amax_edits_and_shapes(old):
    layer = old.nn.QuantConv2d(3, 4, 3)
    q, weight = layer._weight_quantizer, layer.weight.detach().numpy()
    q.amax = reference.amax_of(weight, 0)
    for edit in (
        lambda: q._amax.fill_(0.3),
        lambda: setattr(q, "_amax", q._amax.to("cpu")),
        lambda: q._amax.copy_(torch.full((4, 1, 1, 1), 0.2)),
        lambda: q._amax.data.clamp_(max=0.1),
        lambda: setattr(q, "_amax", torch.tensor(0.15)),
        lambda: setattr(q, "_amax", torch.linspace(0.1, 0.2, 4).reshape(4, 1, 1, 1)),
    ):
        edit()
        wanted = reference.fake_quant(weight, q._amax.numpy())
        np.testing.assert_array_equal(q(layer.weight).detach(), wanted)
        assert hasattr(q, "_amax") and "_weight_quantizer._amax" in layer.state_dict()
    del q._amax
    assert not hasattr(q, "_amax") and "_weight_quantizer._amax" not in layer.state_dict()
    # Without an amax a tensor is quantized by its own range.
    wanted = reference.fake_quant(weight, reference.amax_of(weight, 0))
    np.testing.assert_array_equal(q(layer.weight).detach(), wanted)


def test_14_unseen_reduced_and_learned(old):
    from pytorch_quantization import utils as quant_utils

    descriptor = old.tensor_quant.QuantDescriptor
    q = old.nn.TensorQuantizer(descriptor(axis=(0)))
    q.load_calib_amax(strict=False)
    assert q._amax.isnan().all()
    q.load_calib_amax(strict=False)
    w = torch.randn(4, 3, 2, 2)
    for axis in ((1, 2, 3), {1, 2, 3}, 1, None):
        reduced = tuple(axis) if isinstance(axis, set) else axis
        kept = axis is not None
        wanted = np.abs(w.numpy()).max(reduced, keepdims=kept)
        np.testing.assert_array_equal(quant_utils.reduce_amax(w, axis=axis, keepdims=kept), wanted)
    learned = old.nn.TensorQuantizer(descriptor(learn_amax=True, amax=2.0))
    learned._amax = torch.tensor(3.0)
    learned.init_learn_amax()
    assert (learned.clip.clip_value_min, learned.clip.clip_value_max) == (-3.0, 3.0)
    assert descriptor(axis=(4)).axis == 4
