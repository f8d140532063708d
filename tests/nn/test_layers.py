"""The drop-in layers against torch's own, and against NumPy fake quantization."""

import copy
import inspect

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from pytorch_quant import QuantDescriptor, TensorQuantizer
from pytorch_quant import nn as quant_nn

CONV_CASES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same"},
    {"padding": "valid", "bias": False},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "replicate"},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "reflect", "dilation": 2},
    {"groups": 2, "dilation": 2},
    {"groups": 4, "bias": False},
]
TRANSPOSE_CASES = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"groups": 2, "bias": False},
    {"dilation": 2, "stride": 3},
]
SIZE = 9


def shaped(dims, channels=4):
    return torch.randn(2, channels, *[SIZE] * dims)


def pair(name, *arguments, **keywords):
    """A torch layer and the quantized one with its parameters."""
    layer = getattr(nn, name)(*arguments, **keywords)
    quantized = getattr(quant_nn, f"Quant{name}")(*arguments, **keywords)
    quantized.load_state_dict(layer.state_dict())
    return layer, quantized


def disable(module):
    for m in module.modules():
        if isinstance(m, TensorQuantizer):
            m.disable()
    return module


def conv_layers():
    for dims in (1, 2, 3):
        for case in CONV_CASES:
            if dims == 3 and case.get("padding_mode") == "reflect" and "dilation" in case:
                continue
            yield f"Conv{dims}d", dims, case
        for case in TRANSPOSE_CASES:
            yield f"ConvTranspose{dims}d", dims, case


@pytest.mark.parametrize(("name", "dims", "case"), list(conv_layers()))
def test_convolutions(name, dims, case):
    layer, quantized = pair(name, 4, 8, 3, **case)
    x = shaped(dims)
    assert isinstance(quantized, type(layer))
    expected = _fake_quantized(layer, x, name, case)
    assert torch.equal(quantized(x), expected)
    assert torch.equal(disable(quantized)(x), layer(x))


def _fake_quantized(layer, x, name, case):
    """The torch layer on NumPy-quantized tensors, each quantizer ranged by its own tensor."""
    twin = copy.deepcopy(layer)
    transposed = "Transpose" in name
    axis = (None if case.get("groups", 1) > 1 else 1) if transposed else 0
    w = layer.weight.detach().numpy()
    with torch.no_grad():
        twin.weight.copy_(torch.from_numpy(reference.fake_quant(w, reference.amax_of(w, axis))))
    q = reference.fake_quant(x.numpy(), np.abs(x.numpy()).max())
    return twin(torch.from_numpy(q))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_take_an_output_size(dims):
    layer, quantized = pair(f"ConvTranspose{dims}d", 4, 8, 3, stride=2)
    x, size = shaped(dims), [2 * SIZE + 2] * dims
    got = disable(quantized)(x, output_size=size)
    assert torch.equal(got, layer(x, output_size=size)) and list(got.shape[2:]) == size


def test_unbatched_input():
    layer, quantized = pair("Conv2d", 4, 8, 3)
    x = torch.randn(4, 5, 5)
    assert torch.equal(disable(quantized)(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (6,), (2, 5, 6)])
def test_linear(bias, shape):
    layer, quantized = pair("Linear", 6, 4, bias=bias)
    x = torch.randn(shape)
    w = layer.weight.detach().numpy()
    w = torch.from_numpy(reference.fake_quant(w, reference.amax_of(w, 0)))
    q = torch.from_numpy(reference.fake_quant(x.numpy(), np.abs(x.numpy()).max()))
    assert torch.equal(quantized(x), F.linear(q, w, layer.bias))
    assert torch.equal(disable(quantized)(x), layer(x))


POOLS = [
    ("MaxPool", (3,), {"stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True}),
    ("AvgPool", (2,), {"padding": 1, "count_include_pad": False, "ceil_mode": True}),
    ("AdaptiveAvgPool", (2,), {}),
    ("InstanceNorm", (4,), {"affine": True, "track_running_stats": True, "eps": 1e-3}),
]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("kind", "arguments", "keywords"), POOLS)
def test_layers_with_a_quantized_input_alone(kind, arguments, keywords, dims):
    layer, quantized = pair(f"{kind}{dims}d", *arguments, **keywords)
    x = shaped(dims)
    q = torch.from_numpy(reference.fake_quant(x.numpy(), np.abs(x.numpy()).max()))
    twin = copy.deepcopy(layer)
    assert isinstance(quantized, type(layer))
    assert torch.equal(copy.deepcopy(quantized)(x), twin(q))
    assert torch.equal(disable(quantized)(x), layer(x))
    assert not hasattr(quantized, "_weight_quantizer")


def test_max_pooling_with_indices():
    layer, quantized = pair("MaxPool2d", 2, return_indices=True)
    x = shaped(2)
    for mine, theirs in zip(disable(quantized)(x), layer(x), strict=True):
        assert torch.equal(mine, theirs)


def test_average_pooling_with_a_divisor():
    layer, quantized = pair("AvgPool3d", 2, divisor_override=3)
    x = shaped(3)
    assert torch.equal(disable(quantized)(x), layer(x))


WEIGHTED = [
    ("Conv1d", (4, 8, 3)),
    ("Conv2d", (4, 8, 3)),
    ("Conv3d", (4, 8, 3)),
    ("ConvTranspose1d", (4, 8, 3)),
    ("ConvTranspose2d", (4, 8, 3)),
    ("ConvTranspose3d", (4, 8, 3)),
    ("Linear", (4, 8)),
]


@pytest.mark.parametrize(("name", "arguments"), WEIGHTED)
def test_descriptors_device_and_dtype_are_keywords(name, arguments):
    cls = getattr(quant_nn, f"Quant{name}")
    layer = cls(
        *arguments,
        quant_desc_input=QuantDescriptor(4, unsigned=True),
        quant_desc_weight=QuantDescriptor(3),
        dtype=torch.bfloat16,
        device="meta",
    )
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.is_meta
    assert layer.input_quantizer.num_bits == 4 and layer.input_quantizer.unsigned
    assert layer.weight_quantizer.num_bits == 3 and layer.weight_quantizer.axis is None
    with pytest.raises(TypeError, match="Unused keys: quant_desc_wieght"):
        cls(*arguments, quant_desc_wieght=QuantDescriptor())


def test_signatures_name_the_arguments_of_the_torch_layer():
    for name, _ in WEIGHTED:
        ours = inspect.signature(getattr(quant_nn, f"Quant{name}").__init__).parameters
        theirs = inspect.signature(getattr(nn, name).__init__).parameters
        named = [p for p in theirs if p not in ("device", "dtype")]
        assert [p for p in ours if p != "kwargs"] == named


def test_axis_of_transposed_weights():
    assert quant_nn.QuantConvTranspose2d(4, 8, 3).weight_quantizer.axis == 1
    assert quant_nn.QuantConvTranspose2d(4, 8, 3, groups=2).weight_quantizer.axis is None
    chosen = quant_nn.QuantConvTranspose2d(
        4, 8, 3, groups=2, quant_desc_weight=QuantDescriptor(axis=1)
    )
    assert chosen.weight_quantizer.axis == 1


def test_default_descriptors():
    before = quant_nn.QuantLinear.default_quant_desc_input
    try:
        quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(4))
        quant_nn.QuantLinear.set_default_quant_desc_weight(QuantDescriptor(3, axis=0))
        layer = quant_nn.QuantLinear(2, 2)
        assert layer.input_quantizer.num_bits == 4 and layer.weight_quantizer.num_bits == 3
        assert quant_nn.QuantConv2d(1, 1, 1).input_quantizer.num_bits == 8
        with pytest.raises(ValueError, match="must be a QuantDescriptor, got 8"):
            quant_nn.QuantLinear.set_default_quant_desc_input(8)
    finally:
        quant_nn.QuantLinear.set_default_quant_desc_input(before)
        del quant_nn.QuantLinear.default_quant_desc_weight
        quant_nn.QuantLinear.default_quant_desc_weight = (
            quant_nn.QuantConv2d.default_quant_desc_weight
        )


def test_layers_refuse_integer_codes():
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        quant_nn.QuantLinear(2, 2, quant_desc_input=QuantDescriptor(fake_quant=False))


class Scaled(nn.Module, quant_nn.QuantMixin):
    def __init__(self, size, **kwargs):
        super().__init__()
        desc_input, desc_weight = quant_nn.pop_quant_desc_in_kwargs(type(self), **kwargs)
        self.weight = nn.Parameter(torch.randn(size))
        self.init_quantizer(desc_input, desc_weight)

    def forward(self, x):
        return self._input_quantizer(x) * self._weight_quantizer(self.weight)


def test_a_custom_layer():
    layer, x = Scaled(5, quant_desc_weight=QuantDescriptor(4)), torch.randn(3, 5)
    w = layer.weight.detach().numpy()
    expected = reference.fake_quant(x.numpy(), np.abs(x.numpy()).max()) * reference.fake_quant(
        w, np.abs(w).max(), 4
    )
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-6)


def test_gradients_reach_input_weight_and_bias():
    layer, x = quant_nn.QuantConv2d(2, 3, 3), torch.randn(1, 2, 5, 5, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (x, layer.weight, layer.bias):
        assert tensor.grad.abs().sum() > 0


def test_channels_last_is_kept():
    x = shaped(2).contiguous(memory_format=torch.channels_last)
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
    assert quantizer(x).is_contiguous(memory_format=torch.channels_last)


def test_copies_and_half_precision():
    layer = quant_nn.QuantConv2d(4, 8, 3)
    x = shaped(2)
    layer(x)
    layer._input_quantizer.amax = 2.0
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_clip():
    x = torch.tensor([-2.0, -1.0, 0.5, 3.0], requires_grad=True)
    clip = quant_nn.Clip(-1.0, 1.0, learn_max=True)
    y = clip(x)
    assert y.tolist() == [-1.0, -1.0, 0.5, 1.0]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0] and clip.clip_value_max.grad == 4
    assert isinstance(clip.clip_value_min, torch.Tensor) and len(list(clip.parameters())) == 1


def test_clip_gradients():
    low, high = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.7, 0.6))
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quant_nn.functional.clip, (x, low, high))


def test_learned_clip_bounds_are_scalars():
    with pytest.raises(ValueError, match="must be scalar"):
        quant_nn.Clip(torch.zeros(2), 1.0, learn_min=True)
    with pytest.raises(ValueError, match="can only be scalar"):
        quant_nn.functional.clip(torch.zeros(2), torch.zeros(2, requires_grad=True), 1.0)
    with pytest.raises(ValueError, match="can only be scalar"):
        quant_nn.functional.clip(torch.zeros(2), torch.zeros(2), 1.0)
