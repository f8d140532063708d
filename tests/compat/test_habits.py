"""Habits 1 to 11 of existing programs: building, calibrating, comparing.

Exporting, saving and wrapping are in test_habits_export, the objects in test_habits_objects.
"""

import importlib.metadata
import importlib.util
import inspect

import numpy as np
import pytest
import reference
import torch
from old_programs import BATCHES, conv_and_linear, conv_reference, quantizers, tutorial_loop
from torch import nn
from torch.nn import functional as F

METHODS = [
    {"method": "percentile", "percentile": 99.0},
    {"method": "mse"},
    {"method": "entropy", "strict": False},
]


@pytest.mark.parametrize("arguments", [None, *METHODS], ids=str)
def test_1_tutorial_loop(old, arguments):
    model = conv_and_linear(old, "max" if arguments is None else "histogram")
    for q in quantizers(old, model).values():
        if isinstance(q._calibrator, old.calib.HistogramCalibrator):
            q._calibrator._torch_hist = True
    tutorial_loop(old, model, BATCHES, **(arguments or {}))
    magnitudes = np.abs(torch.stack(BATCHES).numpy())
    amax = float(model[0]._input_quantizer._amax)
    if arguments is None:
        assert amax == magnitudes.max()
    elif arguments["method"] == "percentile":
        assert amax == pytest.approx(np.percentile(magnitudes, 99.0), abs=0.01)
    else:
        assert 0.4 * magnitudes.max() < amax <= magnitudes.max()
    assert model[0]._weight_quantizer._amax.shape == (4, 1, 1, 1)
    with torch.no_grad():
        y = model[0](BATCHES[0])
    torch.testing.assert_close(y, conv_reference(model[0], BATCHES[0]), atol=1e-6, rtol=1e-6)


def test_1_quantizers_without_a_calibrator(old):
    model = conv_and_linear(old)
    model[3]._input_quantizer._calibrator = None
    tutorial_loop(old, model, BATCHES)
    left_out = model[3]._input_quantizer
    assert not hasattr(left_out, "_amax") and not left_out._disabled
    assert all(hasattr(q, "_amax") for q in quantizers(old, model).values() if q is not left_out)


def test_1_moves_to_a_device(old, device):
    model = tutorial_loop(old, conv_and_linear(old, "histogram"), BATCHES, method="entropy")
    y = model(BATCHES[0])
    model.to(device)
    moved = model(BATCHES[0].to(device))
    assert all(q._amax.device.type == device.type for q in quantizers(old, model).values())
    torch.testing.assert_close(moved.cpu(), y, atol=1e-2, rtol=1e-2)
    fresh = conv_and_linear(old)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(BATCHES[0]), y, rtol=0, atol=0)


def quantized_without_init(cls, layer, initializer):
    made = cls.__new__(cls)
    for key, value in vars(layer).items():
        setattr(made, key, value)
    initializer(made)
    return made


def test_2_layers_without_their_init(old):
    desc = old.tensor_quant.QuantDescriptor(num_bits=8, calib_method="histogram")
    weight_desc = old.tensor_quant.QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL

    def __init__(self):
        if isinstance(self, old.mixins.QuantInputMixin) and not hasattr(self, "weight"):
            self.init_quantizer(desc)
        else:
            self.init_quantizer(desc, weight_desc)
        assert self._fake_quant

    x = torch.rand(2, 3, 8, 8)
    conv = quantized_without_init(old.nn.QuantConv2d, nn.Conv2d(3, 4, 3, stride=2), __init__)
    conv._input_quantizer.amax = 1.0
    torch.testing.assert_close(conv(x).detach(), conv_reference(conv, x), atol=1e-6, rtol=1e-6)
    pool = quantized_without_init(old.nn.QuantMaxPool2d, nn.MaxPool2d(2), __init__)
    pool._input_quantizer.amax = 0.5
    wanted = F.max_pool2d(torch.from_numpy(reference.fake_quant(x.numpy(), 0.5)), 2)
    torch.testing.assert_close(pool(x), wanted)
    assert isinstance(pool._input_quantizer._calibrator, old.calib.HistogramCalibrator)


@pytest.mark.parametrize("how", ["map", "argument"])
def test_3_custom_modules(old, how, monkeypatch):
    class QuantBilinear(nn.Bilinear, old.mixins.QuantMixin):
        default_quant_desc_weight = old.tensor_quant.QuantDescriptor(num_bits=8, axis=(0))

        def __init__(self, *sizes, **kwargs):
            super().__init__(*sizes)
            self.init_quantizer(*old.mixins.pop_quant_desc_in_kwargs(type(self), **kwargs))

        def forward(self, a, b):
            weight = self._weight_quantizer(self.weight)
            return F.bilinear(self._input_quantizer(a), b, weight, self.bias)

    class QuantIdentity(nn.Module, old.mixins.QuantInputMixin):
        def __init__(self, **kwargs):
            super().__init__()
            make = old.mixins.pop_quant_desc_in_kwargs
            self.init_quantizer(make(type(self), input_only=True, **kwargs))

        def forward(self, x):
            return self._input_quantizer(x)

    entries = [(nn, "Bilinear", QuantBilinear), (nn, "Identity", QuantIdentity)]
    default_map = old.quant_modules._DEFAULT_QUANT_MAP
    monkeypatch.setattr(old.quant_modules, "_DEFAULT_QUANT_MAP", list(default_map))
    if how == "map":
        entry = old.quant_modules._quant_entry
        old.quant_modules._DEFAULT_QUANT_MAP.append(entry(*entries[0]))
        old.quant_modules._DEFAULT_QUANT_MAP.extend([entry(*entries[1])])
        old.quant_modules.initialize()
    else:
        old.quant_modules.initialize(custom_quant_modules=entries)
    try:
        layer, identity = nn.Bilinear(3, 4, 5), nn.Identity()
    finally:
        old.quant_modules.deactivate()
    assert type(layer) is QuantBilinear and nn.Bilinear not in type(layer).__mro__[:1]
    assert type(nn.Identity()) is not QuantIdentity
    a, b = torch.randn(2, 3), torch.randn(2, 4)
    weight = layer.weight.detach().numpy()
    weight = torch.from_numpy(reference.fake_quant(weight, reference.amax_of(weight, 0)))
    quantized = reference.fake_quant(a.numpy(), reference.amax_of(a.numpy()))
    wanted = F.bilinear(torch.from_numpy(quantized), b, weight, layer.bias)
    torch.testing.assert_close(layer(a, b), wanted)
    np.testing.assert_array_equal(identity(a), quantized)
    fields = [(e.orig_mod, e.mod_name, e.replace_mod) for e in default_map]
    assert (nn, "Conv2d", old.nn.QuantConv2d) in fields


def test_4_classes_forwards_and_hooks(old):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 2))
    model[0].__class__ = old.nn.QuantConv2d
    model[0].init_quantizer(
        old.nn.QuantConv2d.default_quant_desc_input, old.nn.QuantConv2d.default_quant_desc_weight
    )
    seen = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    model[0].register_forward_hook(lambda module, inputs, output: seen.append("after"))
    forward = model[1].forward
    model[1].forward = lambda x: forward(x) * 2
    x = torch.randn(1, 3, 8, 8)
    model[0]._input_quantizer.amax = reference.amax_of(x.numpy())
    wanted = 2 * F.linear(conv_reference(model[0], x), model[1].weight, model[1].bias)
    torch.testing.assert_close(model(x), wanted)
    assert seen == ["before", "after"]


def test_6_sensitivity(old):
    model = conv_and_linear(old)
    tutorial_loop(old, model, BATCHES)
    x = BATCHES[0]
    found = quantizers(old, model)
    for q in found.values():
        q.disable()
    float_layer = nn.Conv2d(3, 4, 3)
    float_layer.load_state_dict({k: v for k, v in model[0].state_dict().items() if "." not in k})
    torch.testing.assert_close(model[0](x), float_layer(x))
    for name, q in found.items():
        if name.startswith("0."):
            q.enable()
    assert not found["0._input_quantizer"]._disabled and found["3._input_quantizer"]._disabled
    torch.testing.assert_close(model[0](x).detach(), conv_reference(model[0], x))


def test_8_amax_surgery(old):
    model = conv_and_linear(old)
    tutorial_loop(old, model, BATCHES)
    a, b = model[0]._input_quantizer, model[3]._input_quantizer
    a._amax = b._amax
    assert a.amax == b.amax
    group = torch.stack([a._amax, torch.tensor(7.0)]).max()
    for q in (a, b):
        q._amax.fill_(group)
    weight_quantizer = model[0].weight_quantizer
    weight_quantizer._amax = weight_quantizer._amax.clamp(min=0.25)
    weight_quantizer.amax = weight_quantizer.amax * 2
    assert float(weight_quantizer.amax.min()) >= 0.5
    state = model.state_dict()
    assert state["0._input_quantizer._amax"] == state["3._input_quantizer._amax"] == 7.0
    x = BATCHES[0]
    assert len(np.unique(a(x * 100).numpy())) <= 256 and float(a(x * 100).max()) == 7.0
    # One quantizer in two places.
    model[3]._input_quantizer = model[0]._input_quantizer
    assert len(quantizers(old, model)) == 3
    assert "3._input_quantizer._amax" in model.state_dict()


def test_9_absl_may_be_missing(old, monkeypatch):
    for name in ("absl", "absl.logging"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    from pytorch_quantization.utils import quant_logging

    assert inspect.ismodule(quant_logging)


def test_11_feature_detection(old):
    assert importlib.util.find_spec("pytorch_quantization") is not None
    assert importlib.metadata.version("pytorch_quantization") == old.package.__version__
    assert old.package.__version__ != "2.1.2"
    assert old.package.__file__
