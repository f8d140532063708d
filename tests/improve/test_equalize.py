"""Cross-layer equalization: the float function stays, the ranges even out, accuracy comes back."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytorch_quant import QuantDescriptor, calibrate
from pytorch_quant import nn as quant_nn
from pytorch_quant.improve.equalize import equalize_weights
from pytorch_quant.nn.modes import named_quantizers

PER_TENSOR = QuantDescriptor(8)


def spread(model, decades=1.5):
    """Give every weight channels of very different ranges."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        shape = parameter.shape[:1] + (1,) * (parameter.dim() - 1)
        exponent = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        parameter.data *= (10 ** (decades * exponent)).to(parameter.dtype)
    return model


CHAINS = {
    "conv": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="zeros"),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(2, padding=1),
        nn.PReLU(6),
        nn.Conv2d(6, 4, 1),
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ),
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.Dropout(0.5),
        nn.Conv2d(12, 6, 1, groups=2),
    ),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 8, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.Identity(),
        nn.Conv2d(6, 2, 1),
    ),
    "flattened": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(),
        nn.Linear(36, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    ),
    "other ranks": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, 6, 3),
        nn.ReLU(),
        nn.AvgPool1d(2),
        nn.Conv1d(6, 4, 3),
        nn.ReLU(),
        nn.Unflatten(2, (5, 5, -1)),
        nn.Conv3d(4, 4, 1),
        nn.ReLU(),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
}
IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def images(name, dtype):
    generator = torch.Generator().manual_seed(3)
    size = (3, 12, 13) if name == "other ranks" else (3, 12, 12)
    return torch.randn(4, *size, generator=generator).to(dtype)


def layers_of(model):
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("name", CHAINS)
def test_the_float_function_stays(name):
    model = spread(CHAINS[name]().double()).eval()
    x = images(name, torch.float64)
    expected = model(x)
    before = {key: value.clone() for key, value in model.named_parameters()}
    objects = {key: id(value) for key, value in model.named_parameters()}
    report = equalize_weights(model, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    layers = layers_of(model)
    assert [(p.first, p.second) for p in report.pairs] == list(pairwise(layers))
    assert [name for name, _ in report.skipped] == [layers[-1]]
    for pair in report.pairs:
        assert not torch.equal(
            model.get_parameter(f"{pair.first}.weight"), before[f"{pair.first}.weight"]
        )
        assert pair.before > 4 and pair.after < 0.5 * pair.before
    assert report.converged and 1 < report.iterations < 20
    assert {key: id(value) for key, value in model.named_parameters()} == objects


def test_the_formula_of_the_paper():
    model = spread(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).double())
    w1, b1, w2 = (
        model.state_dict()[key].numpy().copy() for key in ("0.weight", "0.bias", "2.weight")
    )
    b2 = model[2].bias.detach().numpy().copy()
    equalize_weights(model, IMAGES.double(), iterations=1)
    for i in range(5):
        r1, r2 = np.abs(w1[i]).max(), np.abs(w2[:, i]).max()
        s = np.sqrt(r1 * r2) / r2
        np.testing.assert_allclose(model[0].weight[i].detach().numpy(), w1[i] / s, rtol=1e-12)
        np.testing.assert_allclose(model[0].bias[i].item(), b1[i] / s, rtol=1e-12)
        np.testing.assert_allclose(model[2].weight[:, i].detach().numpy(), w2[:, i] * s, rtol=1e-12)
    np.testing.assert_array_equal(model[2].bias.detach().numpy(), b2)


def test_each_channel_ends_with_one_range():
    model = spread(CHAINS["depthwise"]().double())
    report = equalize_weights(model, IMAGES.double(), iterations=200, tolerance=1e-6)
    assert report.converged
    a, depthwise, c = (model[i].weight.detach().numpy() for i in (0, 2, 4))
    depthwise = np.abs(depthwise).max((1, 2, 3))
    np.testing.assert_allclose(np.abs(a).max((1, 2, 3)), depthwise, rtol=1e-4)
    np.testing.assert_allclose(np.abs(c).max((0, 2, 3)), depthwise, rtol=1e-4)


def test_dead_channels_are_left_alone():
    model = spread(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    with torch.no_grad():
        model[0].weight[1], model[0].weight[2], model[2].weight[:, 4] = 0, 1e-30, 0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = equalize_weights(model, torch.randn(2, 4))
    after = model.state_dict()
    for i in (1, 2, 4):
        for key in ("0.weight", "0.bias"):
            assert torch.equal(after[key][i], before[key][i])
        assert torch.equal(after["2.weight"][:, i], before["2.weight"][:, i])
    assert not torch.equal(after["0.weight"][0], before["0.weight"][0])
    assert np.isfinite(report.pairs[0].after)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.b(x)) + x
        return self.c(F.relu(torch.cat([x, x], 1)[:, :3]))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.b(self.a(x)))


class Tied(Twice):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def after(layer):
    return nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 4, 1))


class ChannelPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(F.max_pool1d(self.a(x[:, 0]), 2))


UNPAIRED = {
    "batch norm": (after(nn.BatchNorm2d(4)), "0", "fold_batchnorm"),
    "relu6": (after(nn.ReLU6()), "0", "1/clamp#0 between does not scale"),
    "sigmoid": (after(nn.Sigmoid()), "0", "sigmoid"),
    "gelu": (after(nn.GELU()), "0", "gelu"),
    "silu": (after(nn.SiLU()), "0", "silu"),
    "group norm": (after(nn.GroupNorm(1, 4)), "0", "group_norm#0 between does not scale"),
    "two places": (Residual(), "a", "goes to 2 places: b/conv#0, /add#0"),
    "sum": (Residual(), "b", "/add#0 combines its output with other tensors"),
    "twice": (Twice(), "a", "b is called 2 times"),
    "tied": (Tied(), "a", "a shares a parameter: a.weight, b.weight"),
    "output": (nn.Linear(12, 4), "", "an output of the model"),
    "pool over channels": (ChannelPool(), "a", "/max_pool#0 between does not scale"),
    "parametrized": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 4))),
        "0",
        "as they are",
    ),
}


@pytest.mark.parametrize("case", UNPAIRED)
def test_what_is_not_paired_and_why(case):
    model, layer, reason = UNPAIRED[case]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 4) if isinstance(model, Twice) else IMAGES
    report = equalize_weights(model, x)
    assert not report.pairs
    assert reason in dict(report.skipped)[layer]
    assert reason in str(report)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_failures_change_nothing():
    class Moody(Twice):
        """What the second half computes depends on the values between."""

        def __init__(self):
            super().__init__()
            self.a.register_forward_hook(self.look)

        def look(self, module, args, result):
            with torch._C.DisableTorchFunction():
                self.scale = result.abs().mean()

        def forward(self, x):
            return self.b(F.relu(self.a(x))) / self.scale

    model = spread(Moody())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="no torch function shows it"):
        equalize_weights(model, torch.randn(8, 4))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)

    half = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).half()
    with torch.no_grad():
        half[0].weight[0] *= 1e-3
        half[0].bias.fill_(3e4)
    state = {key: value.clone() for key, value in half.state_dict().items()}
    with pytest.raises(ValueError, match=r"0: the equalized weight or bias exceeds .*float16"):
        equalize_weights(half, torch.randn(8, 4).half())
    torch.testing.assert_close(half.state_dict(), state, rtol=0, atol=0)

    broken = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^2: NaN or Inf"):
        equalize_weights(broken, torch.randn(8, 4))
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        equalize_weights(nn.ReLU(), torch.randn(8, 4))
    for wrong in ({"iterations": 0}, {"tolerance": 0}):
        with pytest.raises(ValueError, match="out of range"):
            equalize_weights(model, torch.randn(8, 4), **wrong)


def quantized_chain(**descriptors):
    return nn.Sequential(
        quant_nn.QuantLinear(4, 6),
        nn.ReLU(),
        quant_nn.QuantLinear(6, 5, **descriptors),
        nn.Sigmoid(),
        quant_nn.QuantLinear(5, 3),
    )


def test_ranges_of_a_calibrated_model():
    model = spread(quantized_chain())
    x = torch.randn(16, 4)
    calibrate(model, [x], progress=False)
    kept = {n: q.amax.clone() for n, q in named_quantizers(model).items()}
    report = equalize_weights(model, x)
    assert report.uncalibrated == ["2._input_quantizer"] and report.uncalibrated[0] in str(report)
    quantizers = named_quantizers(model)
    assert quantizers["2._input_quantizer"].amax is None
    assert quantizers["2._input_quantizer"].calibrator.compute_amax() is None
    for name in ("0", "2"):
        amax = model.get_parameter(f"{name}.weight").detach().abs().amax(1, keepdim=True)
        assert torch.equal(quantizers[f"{name}._weight_quantizer"].amax, amax)
        assert not torch.equal(amax, kept[f"{name}._weight_quantizer"])
    for name in ("0._input_quantizer", "4._input_quantizer", "4._weight_quantizer"):
        assert torch.equal(quantizers[name].amax, kept[name])
    fresh = spread(quantized_chain())
    report = equalize_weights(fresh, x)
    assert report.uncalibrated == [] and len(report.pairs) == 1
    assert all(q.amax is None for q in named_quantizers(fresh).values())


@pytest.mark.parametrize("which", ["quant_desc_input", "quant_desc_weight"])
def test_fixed_and_learned_ranges_keep_their_layers(which):
    for kind, desc in {
        "fixed": QuantDescriptor(8, amax=1.0),
        "learned": QuantDescriptor(8, amax=1.0, learn_amax=True),
    }.items():
        model = quantized_chain(**{which: desc})
        reason = dict(equalize_weights(model, torch.randn(2, 4)).skipped)["0"]
        assert reason.startswith(f"2._{which.split('_')[-1]}_quantizer has a {kind} range")


class Separable(nn.Module):
    """Pointwise and depthwise convolutions without batch norm, quantized per tensor."""

    def __init__(self):
        super().__init__()

        def conv(*args, **kwargs):
            return quant_nn.QuantConv2d(*args, quant_desc_weight=PER_TENSOR, **kwargs)

        self.convs = nn.ModuleList(
            [
                conv(1, 16, 3, padding=1, stride=2),
                conv(16, 16, 3, padding=1, groups=16),
                conv(16, 32, 1),
                conv(32, 32, 3, padding=1, stride=2, groups=32),
                conv(32, 32, 1),
            ]
        )
        self.fc = quant_nn.QuantLinear(32, 10, quant_desc_weight=PER_TENSOR)

    def forward(self, x):
        for layer in self.convs:
            x = F.relu(layer(x))
        return self.fc(x.mean((2, 3)))


def trained(train):
    """Trained unquantized, then with scale moved between the channels of its layers at random."""
    model = Separable()
    for quantizer in named_quantizers(model).values():
        quantizer.disable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    steps = 400
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-2, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(train.images), (64,), generator=generator)
        pixels = F.avg_pool2d(train.images[chosen], 2)
        loss = F.cross_entropy(model(pixels), train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for quantizer in named_quantizers(model).values():
        quantizer.enable()
    layers = [*model.convs, model.fc]
    with torch.no_grad():
        for first, second in pairwise(layers):
            s = 10 ** (torch.rand(len(first.weight), generator=generator) * 3 - 1.5)
            first.weight *= s.reshape(-1, 1, 1, 1)
            first.bias *= s
            depthwise = getattr(second, "groups", 1) > 1
            shape = (-1, 1, 1, 1) if depthwise else (1, -1, *[1] * (second.weight.dim() - 2))
            second.weight /= s.reshape(shape)
    return model.eval()


@torch.no_grad()
def accuracy(model, data, quantized):
    quantizers = named_quantizers(model).values()
    for quantizer in quantizers:
        (quantizer.enable_quant if quantized else quantizer.disable_quant)()
    predicted = model(F.avg_pool2d(data.images, 2)).argmax(1)
    return 100 * (predicted == data.labels).float().mean().item()


@pytest.mark.slow
def test_accuracy_comes_back_on_the_digits():
    pytest.importorskip("sklearn")
    from pytorch_quant.demo.digits import load_digits

    train, tests = load_digits()
    model = trained(train)
    batches = [F.avg_pool2d(train.images[:256], 2)]
    full = accuracy(model, tests, quantized=False)
    calibrate(model, batches, progress=False)
    collapsed = accuracy(model, tests, quantized=True)
    report = equalize_weights(model, batches[0])
    assert len(report.pairs) == 5 and len(report.uncalibrated) == 5
    assert accuracy(model, tests, quantized=False) == pytest.approx(full, abs=0.2)
    for quantizer in named_quantizers(model).values():
        quantizer.enable_quant()
    calibrate(model, batches, progress=False)
    recovered = accuracy(model, tests, quantized=True)
    assert full - collapsed >= 10
    assert recovered - collapsed >= 0.8 * (full - collapsed)
