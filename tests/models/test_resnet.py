"""The residual networks against torchvision's, and where their quantizers are."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from pytorch_quant import nn as quant_nn
from pytorch_quant import quant_modules
from pytorch_quant.models import (
    ARCHITECTURES,
    BasicBlock,
    ResidualBlock,
    ResNet,
    create_model,
    resnet18,
    resnet50,
    resnext50_32x4d,
)
from pytorch_quant.nn import TensorQuantizer

NAMES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


@pytest.fixture(scope="module")
def torchvision_models():
    try:
        from torchvision import models
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    return models


def small(arch="resnet18", **options):
    """A network of few channels, in eval mode, that takes little time."""
    options = {"num_classes": 5, "small_input": True, "width": 16} | options
    return create_model(arch, **options).eval()


def quantizers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def spread_batchnorm(model):
    """Statistics and scales unlike the initial ones, so that no layer is the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return model


def shapes(model):
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


def test_every_architecture_is_listed():
    assert list(ARCHITECTURES) == NAMES


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("arch", NAMES)
def test_names_and_shapes_equal_torchvision(arch, quantize, torchvision_models):
    with torch.device("meta"):
        ours = create_model(arch, quantize=quantize)
        theirs = getattr(torchvision_models, arch)()
    # Lists: an optimizer's state goes by the order of the parameters.
    assert shapes(ours) == shapes(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet18", {}),
        ("resnet50", {}),
        ("resnext50_32x4d", {}),
        ("wide_resnet50_2", {}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
    ],
)
def test_output_equals_torchvision(arch, options, quantize, torchvision_models):
    theirs = spread_batchnorm(getattr(torchvision_models, arch)(num_classes=7, **options)).eval()
    ours = create_model(arch, quantize=quantize, num_classes=7, **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for quantizer in quantizers(ours).values():
        quantizer.disable()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_disabled_quantizers_give_the_float_output(arch):
    plain = spread_batchnorm(small(arch))
    quantized = small(arch, quantize=True)
    quantized.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert not torch.equal(quantized(x), plain(x))
        for quantizer in quantizers(quantized).values():
            quantizer.disable()
        assert torch.equal(quantized(x), plain(x))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_residual_quantizer_is_on_the_identity_alone(arch):
    model = spread_batchnorm(small(arch, quantize=True))
    met = []
    for name, quantizer in quantizers(model).items():
        if not name.endswith("residual_quantizer"):
            quantizer.disable()
            continue
        # Turns the identity into zeros, so that the block returns what its other branch gives.
        quantizer.register_forward_hook(lambda module, args, y: met.append(args[0]) or y * 0)
    for block in (m for m in model.modules() if isinstance(m, ResidualBlock)):
        met.clear()
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        with torch.inference_mode():
            y = block(x)
            identity = x if block.downsample is None else block.downsample(x)
            assert len(met) == 1 and torch.equal(met[0], identity)
            assert torch.equal(y, block.residual(x).relu())


def test_both_kinds_of_identity_occur():
    model = small(quantize=True)
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    assert [b.downsample is not None for b in blocks] == [False, False] + [True, False] * 3


@pytest.mark.parametrize(
    ("arch", "convs", "blocks"), [("resnet18", 20, 8), ("resnet50", 53, 16), ("resnet101", 104, 33)]
)
def test_number_of_quantizers(arch, convs, blocks):
    with torch.device("meta"):
        names = list(quantizers(create_model(arch, quantize=True)))
    assert sum(n.endswith("residual_quantizer") for n in names) == blocks
    # Two of each convolution and of fc, one of the global average pooling.
    assert len(names) == 2 * convs + blocks + 1 + 2
    assert "avgpool._input_quantizer" in names and "fc._weight_quantizer" in names


def test_a_float_network_has_no_quantizer():
    assert not quantizers(small())


def test_a_patch_quantizes_the_layers_without_residual_quantizers():
    with quant_modules.initialize():
        patched = small()
    built = small(quantize=True)
    residual = {n for n in quantizers(built) if n.endswith("residual_quantizer")}
    assert set(quantizers(patched)) == set(quantizers(built)) - residual
    assert type(patched.conv1) is quant_nn.QuantConv2d
    assert not quantizers(small())


def test_a_patch_leaves_the_initial_weights_alone():
    with quant_modules.initialize():
        torch.manual_seed(3)
        patched = small()
    torch.manual_seed(3)
    plain = small()
    for name, value in plain.state_dict().items():
        assert torch.equal(patched.state_dict()[name], value), name


def test_residual_quantizers_take_the_descriptor_of_convolution_inputs():
    former = quant_nn.QuantConv2d.default_quant_desc_input
    quant_nn.QuantConv2d.set_default_quant_desc_input(former.replace(num_bits=4))
    try:
        model = small(quantize=True)
    finally:
        quant_nn.QuantConv2d.set_default_quant_desc_input(former)
    assert {
        b.residual_quantizer.num_bits for b in model.modules() if isinstance(b, BasicBlock)
    } == {4}


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_small_input_keeps_the_resolution(arch, quantize):
    model = small(arch, quantize=quantize, in_channels=1)
    seen = {}
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: seen.update({name: tuple(y.shape)})
        )
    with torch.inference_mode():
        logits = model(torch.randn(2, 1, 32, 32))
    expansion = 1 if arch == "resnet18" else 4
    assert seen == {
        "conv1": (2, 16, 32, 32),
        "maxpool": (2, 16, 32, 32),
        "layer1": (2, 16 * expansion, 32, 32),
        "layer2": (2, 32 * expansion, 16, 16),
        "layer3": (2, 64 * expansion, 8, 8),
        "layer4": (2, 128 * expansion, 4, 4),
        "avgpool": (2, 128 * expansion, 1, 1),
    }
    assert logits.shape == (2, 5)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_every_parameter_gets_a_gradient(arch, quantize):
    model = small(arch, quantize=quantize).train()
    model(torch.randn(4, 3, 16, 16)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initial_weights_follow_he():
    model = resnet50()
    conv = model.layer3[0].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert all(float(m.bn3.weight.detach().min()) == 1 for m in model.layer1)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_zero_init_residual_starts_blocks_as_their_identity(arch):
    model = small(arch, zero_init_residual=True)
    block = model.layer1[1]
    x = torch.randn(2, block.conv1.in_channels, 8, 8).relu()
    with torch.inference_mode():
        assert torch.equal(block(x), x)


def test_norm_layer_and_pickle():
    model = small(quantize=True, norm_layer=lambda channels: nn.GroupNorm(4, channels))
    assert isinstance(model.layer2[0].downsample[1], nn.GroupNorm)
    copied = pickle.loads(pickle.dumps(model))
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: create_model("resnet51"), r"unknown architecture 'resnet51'; did you mean"),
        (lambda: create_model("vgg"), r"'vgg'; Valid: resnet18, .*, wide_resnet101_2$"),
        (lambda: resnet18(groups=2), r"groups=1 only, got 2"),
        (lambda: resnet18(width_per_group=128), r"width_per_group=64 only, got 128"),
        (
            lambda: resnet18(replace_stride_with_dilation=(True, False, False)),
            r"dilation=1 only, got 2",
        ),
        (
            lambda: resnet50(replace_stride_with_dilation=(True,)),
            r"replace_stride_with_dilation three, got \[3, 4, 6, 3\] and \[True\]",
        ),
        (lambda: ResNet(BasicBlock, (2, 2)), r"layers has four entries .* got \[2, 2\]"),
        (lambda: resnext50_32x4d(width=8), r"width=8 with width_per_group=4 leaves groups"),
        (lambda: resnet18(width=0), r"width must be at least 1, got 0"),
        (lambda: resnet18(num_classes=0), r"num_classes must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(build, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build()
