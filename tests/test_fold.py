"""Batch norm, folded and frozen: the float function stays, and so do the integer codes."""

import copy
import pickle
import warnings

import numpy as np
import onnx
import pytest
import reference
import torch
from onnx_runs import run
from torch import nn
from torch.nn import functional as F

from pytorch_quant import QuantDescriptor, calibrate, compute_amax, export_onnx
from pytorch_quant import nn as quant_nn
from pytorch_quant.dataflow import record
from pytorch_quant.fold import FoldedPair, FoldReport, _fold, fold_batchnorm, freeze_batchnorm
from pytorch_quant.nn.modes import named_quantizers

NORMS = nn.modules.batchnorm._BatchNorm
PER_TENSOR = QuantDescriptor(8)


def trained(model, seed=3):
    """Give every batch norm statistics and parameters, some scales negative."""
    generator = torch.Generator().manual_seed(seed)
    for norm in [m for m in model.modules() if isinstance(m, NORMS)]:
        if norm.running_mean is not None:
            norm.running_mean.normal_(generator=generator).mul_(0.5)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
        if norm.affine:
            sign = torch.where(torch.rand(norm.num_features, generator=generator) < 0.4, -1.0, 1.0)
            norm.weight.data.uniform_(0.3, 2.0, generator=generator).mul_(sign)
            if norm.bias is not None:
                norm.bias.data.normal_(generator=generator)
    return model


def without_beta(norm):
    norm.bias = None
    return norm


def folded(model, x, layers, tolerance=1e-10):
    """Fold, and compare with what the model gave before."""
    model.eval()
    expected = model(x)
    report = fold_batchnorm(model, x)
    assert [pair.layer for pair in report.pairs] == layers, str(report)
    found = model(x)
    assert found.dtype == expected.dtype and expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return report


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before, modules):
    assert list(model.modules()) == modules
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


SEQUENCES = {
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], (2, 4, 9)),
    "conv2d": (lambda: [nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)], (2, 4, 9, 8)),
    "conv3d": (lambda: [nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)], (2, 4, 3, 4, 5)),
    "no bias": (lambda: [nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)], (2, 4, 9, 8)),
    "depthwise": (lambda: [nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)], (2, 4, 9, 8)),
    "grouped": (lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], (2, 4, 9, 8)),
    "transposed1d": (lambda: [nn.ConvTranspose1d(4, 6, 3, 2), nn.BatchNorm1d(6)], (2, 4, 9)),
    "transposed2d": (lambda: [nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6)], (2, 4, 5, 6)),
    "transposed3d": (lambda: [nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6)], (2, 4, 3, 4, 5)),
    "transposed grouped": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)],
        (2, 4, 5, 6),
    ),
    "linear": (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], (5, 4)),
    "affine=False": (lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)], (2, 4, 9, 8)),
    "no beta": (lambda: [nn.Linear(4, 6), without_beta(nn.BatchNorm1d(6))], (5, 4)),
    "synchronized": (lambda: [nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6, eps=0.1)], (2, 4, 9, 8)),
    "dropout between": (
        lambda: [nn.Conv2d(4, 6, 3), nn.Identity(), nn.Dropout2d(), nn.BatchNorm2d(6)],
        (2, 4, 9, 8),
    ),
    "before conv": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2)], (2, 4, 9, 8)),
    "before grouped": (
        lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False, padding="valid")],
        (2, 4, 9, 8),
    ),
    "before reflecting": (
        lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")],
        (2, 4, 9, 8),
    ),
    "before replicating": (
        lambda: [nn.BatchNorm2d(4), nn.ReplicationPad2d(2), nn.Conv2d(4, 6, 3)],
        (2, 4, 9, 8),
    ),
    "before linear": (lambda: [nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)], (5, 4)),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_float_outputs_stay(name):
    make, shape = SEQUENCES[name]
    model = trained(nn.Sequential(*make())).double()
    for parameter in model.parameters():
        # Values that float32 does not hold.
        parameter.data /= 1.1
    layer = next(
        str(i)
        for i, m in enumerate(model)
        if getattr(m, "weight", None) is not None and m.weight.dim() > 1
    )
    folded(model, torch.randn(shape, dtype=torch.float64), [layer])
    assert not any(isinstance(m, NORMS) for m in model.modules())


@pytest.mark.parametrize("groups", [1, 2])
def test_zero_shift_folds_into_layers_with_a_border(groups):
    for layer in (nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, 2, groups=groups)):
        model = trained(nn.Sequential(nn.BatchNorm2d(4), layer)).double().eval()
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        report = fold_batchnorm(model, x)
        assert not report.pairs and "pads with zeros" in report.skipped[0][1]
        model[0].running_mean.zero_()
        model[0].bias.data.zero_()
        folded(model, x, ["1"])


def test_both_sides_of_one_layer():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    report = folded(trained(model).double(), torch.randn(2, 3, 6, 6).double(), ["1", "1"])
    assert report.pairs[0].note == "the layer comes after the batch norm"


def test_second_batch_norm_folds_on_the_second_call():
    model = trained(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5))).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    report = folded(model, x, ["0"])
    assert report.skipped[0][0] == "2"
    folded(model, x, ["0"])
    assert fold_batchnorm(model, x) == FoldReport()


def test_zero_gamma_and_zero_variance():
    model = trained(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))).double()
    model[1].weight.data[2] = 0
    model[1].running_var[3] = 0
    folded(model, torch.randn(2, 3, 6, 6).double(), ["0"])
    assert not model[0].weight[2].any() and model[0].bias[2] == model.get_parameter("0.bias")[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = trained(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5))).to(dtype)
    folded(model, torch.randn(2, 3, 6, 6).to(dtype), ["0"], 8 * torch.finfo(dtype).eps)
    assert model[0].weight.dtype == model[0].bias.dtype == dtype


def test_beyond_the_range_of_the_dtype_stays():
    model = trained(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))).half()
    model[0].weight.data.fill_(6e4)
    model[0].bias.data.zero_()
    model[1].weight.data.fill_(30)
    before, modules = state(model), list(model.modules())
    report = fold_batchnorm(model.eval(), torch.zeros(2, 3, dtype=torch.float16))
    assert report.skipped == [("1", "weight or bias of 0 would exceed the range of torch.float16")]
    assert_unchanged(model, before, modules)


# Which pairs


class Misleading(nn.Module):
    """Names and the order of registration say nothing; one convolution is called as a function."""

    def __init__(self):
        super().__init__()
        self.norm_of_second = nn.BatchNorm2d(4)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.functional = nn.Conv2d(4, 4, 1)
        self.again = self.bn2

    def forward(self, x):
        x = F.relu(self.norm_of_second(self.conv1(x)))
        x = F.relu(self.again(self.conv2(x)))
        return self.bn1(F.conv2d(x, self.functional.weight, bias=self.functional.bias))


def test_pairs_come_from_the_calls():
    model = trained(Misleading()).double()
    report = folded(model, torch.randn(2, 3, 4, 4).double(), ["conv1", "conv2", "functional"])
    assert [p.batch_norm for p in report.pairs] == ["norm_of_second", "bn2", "bn1"]
    assert isinstance(model.again, nn.Identity) and model.again is model.bn2


class Net(nn.Module):
    """A forward pass, and modules by name."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.call = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.call(self, x)


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Scripted(nn.Module):
    """A convolution of which only one call can be seen."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.held = torch.jit.script(conv())

    def forward(self, x):
        return self.held(x)


def hooked():
    norm = nn.BatchNorm2d(3)
    norm.register_forward_hook(lambda module, args, result: result + 1)
    return norm


def conv():
    return nn.Conv2d(3, 3, 1)


STAY = {
    "shared conv": (lambda m, x: m.n(m.c(m.c(x))), {}, "c is called 2 times"),
    "shared norm": (lambda m, x: m.n(m.c(m.n(m.d(x)))), {"d": conv()}, "n is called 2 times"),
    "residual": (lambda m, x: (lambda y: m.n(y) + y)(m.c(x)), {}, "goes to 2 places"),
    "an output": (lambda m, x: (lambda y: (m.n(y), y))(m.c(x)), {}, "an output of the model"),
    "not called": (lambda m, x: m.c(x), {}, "n is called 0 times"),
    "no statistics": (
        lambda m, x: m.n(m.c(x)),
        {"n": nn.BatchNorm2d(3, track_running_stats=False)},
        "no running statistics",
    ),
    "hooks": (lambda m, x: m.n(m.c(x)), {"n": hooked()}, "it has hooks"),
    "activation inside": (lambda m, x: m.n(m.c(x)), {"n": Activated(3)}, "relu#0 as well"),
    "as a function": (
        lambda m, x: F.batch_norm(m.c(x), m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias),
        {},
        "instead of calling it",
    ),
    "parametrization": (
        lambda m, x: m.n(m.c(x)),
        {"c": nn.utils.parametrizations.weight_norm(conv())},
        "takes the weight of no",
    ),
    "no bias to take": (
        lambda m, x: m.n(F.conv2d(x, m.c.weight)),
        {"c": nn.Conv2d(3, 3, 1, bias=False)},
        "would miss a new bias",
    ),
    "function between": (lambda m, x: m.n(m.c(x) * 2), {}, "/mul#0 comes before it"),
    "two outputs in one": (
        lambda m, x: m.n(torch.cat([m.c(x)[:, :1], x[:, 1:]], 1)),
        {},
        "/cat#0 comes before it",
    ),
    "quantizer between": (
        lambda m, x: m.n(m.q(m.c(x))),
        {"q": quant_nn.TensorQuantizer(PER_TENSOR)},
        "q quantizes its input",
    ),
    "another axis": (
        lambda m, x: m.n(m.c(x[:, :, :, 0])),
        {"c": nn.Linear(4, 4), "n": nn.BatchNorm1d(3)},
        "not the channels of c",
    ),
    "relu before conv": (lambda m, x: m.c(F.relu(m.n(x))), {}, "/relu#0 comes after it"),
    "scripted": (lambda m, x: m.n(m.c(x)), {"c": Scripted()}, "c.held/script#0 comes before it"),
    "zero padding": (lambda m, x: m.c(F.pad(m.n(x), (1, 1))), {}, "/pad#0 comes after it"),
}


@pytest.mark.parametrize("case", STAY)
def test_what_stays(case):
    forward, modules, reason = STAY[case]
    model = trained(Net(forward, **{"c": conv(), "n": nn.BatchNorm2d(3), **modules})).eval()
    before, present = state(model), list(model.modules())
    report = fold_batchnorm(model, torch.randn(2, 3, 4, 4))
    assert not report.pairs
    assert [name for name, _ in report.skipped] == ["n"] and reason in report.skipped[0][1]
    assert_unchanged(model, before, present)


def test_tied_weights_stay():
    model = trained(Net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.BatchNorm2d(3), d=conv()))
    model.d.weight = model.c.weight
    assert "shares a tensor: c.weight, d.weight" in str(
        fold_batchnorm(model, torch.ones(1, 3, 2, 2))
    )


NETWORKS = {
    "resnet18": ({}, 20, 0),
    "mobilenet_v2": ({}, 52, 0),
    # A dense layer is norm, relu, conv, norm, relu, conv: half of the norms follow a layer.
    "densenet121": ({}, 59, 62),
    "googlenet": ({"init_weights": False, "aux_logits": True}, 57, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    options, pairs, skipped = NETWORKS[name]
    models = pytest.importorskip("torchvision.models")
    model = trained(getattr(models, name)(weights=None, **options)).eval()
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = model(x)
        report = fold_batchnorm(model, x)
        found = model(x)
    assert (len(report.pairs), len(report.skipped)) == (pairs, skipped)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# The model around


def test_what_others_hold_stays_valid():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    model[1].bias.requires_grad_(False)
    weight, x = model[0].weight, torch.randn(2, 3, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    statistics = model[1].running_mean.clone()
    norm = model[1]
    report = fold_batchnorm(model, x)
    assert report.pairs == [FoldedPair("0", "1", "the layer has a bias now")]
    assert all(module.training for module in model.modules())
    assert torch.equal(norm.running_mean, statistics) and norm.num_batches_tracked == 0
    assert model[0].weight is weight and isinstance(model[0].bias, nn.Parameter)
    assert not model[0].bias.requires_grad and weight.requires_grad
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    before = weight.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


class PlainList(nn.Module):
    """Calls its second batch norm where no registration shows it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.steps = [self.conv, self.norm]

    def forward(self, x):
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return x


def test_invisible_uses_roll_back():
    model = trained(PlainList()).eval()
    before, modules = state(model), list(model.modules())
    with pytest.raises(RuntimeError, match="norm folded into conv, its outputs are others"):
        fold_batchnorm(model, torch.randn(2, 3, 4, 4))
    assert_unchanged(model, before, modules)
    assert model.conv.bias is None


def test_a_model_that_does_not_run_rolls_back():
    model = trained(Net(lambda m, x: m.n(m.c(x)) + m.n.eps, c=conv(), n=nn.BatchNorm2d(3))).eval()
    before, modules = state(model), list(model.modules())
    with pytest.raises(RuntimeError, match="n folded into c, the model raises AttributeError"):
        fold_batchnorm(model, torch.randn(2, 3, 4, 4))
    assert_unchanged(model, before, modules)


def test_an_interrupt_rolls_back():
    def interrupted(m, x):
        if isinstance(m.n, nn.Identity):
            raise KeyboardInterrupt
        return m.n(m.c(x))

    model = trained(Net(interrupted, c=conv(), n=nn.BatchNorm2d(3)))
    before, modules = state(model), list(model.modules())
    with pytest.raises(KeyboardInterrupt):
        fold_batchnorm(model, torch.randn(2, 3, 4, 4))
    assert_unchanged(model, before, modules)


def test_wrong_use():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="got no example_inputs; pass"):
        fold_batchnorm(model)
    with pytest.raises(TypeError, match="a batch is a tensor"):
        fold_batchnorm(model, 3)
    model[1].running_var[1] = float("nan")
    with pytest.raises(ValueError, match=r"^1: NaN or Inf in its running_var"):
        fold_batchnorm(model, torch.ones(1, 3, 2, 2))
    assert isinstance(model[1], nn.BatchNorm2d)


def test_report_is_a_table():
    report = FoldReport([FoldedPair("conv", "bn", "note")], [("norm5", "reason")])
    assert str(report).splitlines() == [
        "batch norm  layer       note",
        "bn          conv        note",
        "norm5       not folded  reason",
    ]


# Quantized layers


def quantized(layer, *arguments, **keywords):
    return getattr(quant_nn, f"Quant{layer}")(*arguments, **keywords)


def small_net(per_tensor=False):
    weight = {"quant_desc_weight": PER_TENSOR} if per_tensor else {}
    return trained(
        nn.Sequential(
            quantized("Conv2d", 3, 16, 3, bias=False, **weight),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            quantized("Conv2d", 16, 16, 3, groups=16, **weight),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            quantized("ConvTranspose2d", 16, 24, 3, stride=2, **weight),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            quantized("Linear", 24, 10, **weight),
            nn.BatchNorm1d(10),
        )
    ).eval()


def steps(layer):
    """Weights in steps, rounded and not saturated."""
    scale = layer._weight_quantizer.amax.numpy() / np.float32(127)
    return np.rint(layer.weight.detach().numpy() / scale)


def weight_codes(layer):
    amax = layer._weight_quantizer.amax.numpy()
    codes = reference.codes(layer.weight.detach().numpy(), amax)
    # What the reference says is what the quantizer does.
    y = layer._weight_quantizer(layer.weight).detach().numpy()
    np.testing.assert_array_equal(y, codes * (amax / np.float32(127)))
    return codes


def signs(norm, layer):
    sign = np.sign(norm.weight.detach().numpy())
    channel = int(isinstance(layer, nn.ConvTranspose2d))
    return sign.reshape([-1 if a == channel else 1 for a in range(layer.weight.dim())])


@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_codes_stay_up_to_sign(per_tensor, saturated):
    model = small_net(per_tensor)
    batches = [torch.randn(4, 3, 12, 12) for _ in range(2)]
    calibrate(model, batches, progress=False)
    pairs = [(m, model[i + 1]) for i, m in enumerate(model) if hasattr(m, "_weight_quantizer")]
    if saturated:
        for layer, _ in pairs:
            layer._weight_quantizer.amax = layer._weight_quantizer.amax * 0.7
    inputs = {n: q.amax.clone() for n, q in named_quantizers(model).items() if "input" in n}
    before = [steps(layer) * signs(norm, layer) for layer, norm in pairs]
    report = fold_batchnorm(model, batches[0])
    assert [pair.layer for pair in report.pairs] == ["0", "3", "6", "11"]
    for (layer, _), old in zip(pairs, before, strict=True):
        # -128 becomes 127, and what saturates at 127 becomes -128; else it is the same.
        assert np.array_equal(weight_codes(layer), np.clip(old, -128, 127))
        assert saturated == bool((np.abs(old) > 127).any())
        axis = int(isinstance(layer, nn.ConvTranspose2d))
        assert layer._weight_quantizer.axis == axis
        shape = [n if a == axis else 1 for a, n in enumerate(layer.weight.shape)]
        assert list(layer._weight_quantizer.amax.shape) == shape
    notes = ["_weight_quantizer is per channel now" in pair.note for pair in report.pairs]
    assert notes == [per_tensor] * 4
    for name, amax in inputs.items():
        assert torch.equal(named_quantizers(model)[name].amax, amax)


def test_few_codes_at_ties_move():
    layer = quantized("Linear", 2000, 1000)
    layer.weight.data.normal_().mul_(40)
    # Where weights crowd around ties on purpose, more of them move, but by one step as well.
    halves = torch.randint(-254, 255, (100, 2000)) / 2
    layer.weight.data[:100] = halves + torch.rand(100, 2000) * 1e-4
    layer._weight_quantizer.amax = torch.full((1000, 1), 127.0)
    model = trained(nn.Sequential(layer, nn.BatchNorm1d(1000))).eval()
    old = np.clip(steps(layer) * signs(model[1], layer), -128, 127)
    fold_batchnorm(model, torch.randn(2, 2000))
    moved = np.abs(weight_codes(layer) - old)
    assert moved.max() == 1
    assert (moved[100:] > 0).mean() < 1e-5


@pytest.mark.parametrize("per_tensor", [False, True])
def test_fake_quantized_outputs_stay(per_tensor):
    model = small_net(per_tensor)
    x = torch.randn(4, 3, 12, 12)
    calibrate(model, [x], progress=False)
    with torch.no_grad():
        expected = model(x)
        fold_batchnorm(model, x)
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_zero_gamma_is_a_dead_channel():
    model = trained(nn.Sequential(quantized("Conv2d", 3, 4, 1), nn.BatchNorm2d(4))).eval()
    model[1].weight.data[1] = 0
    x = torch.randn(2, 3, 4, 4)
    calibrate(model, [x], progress=False)
    beta = model[1].bias[1].item()
    fold_batchnorm(model, x)
    assert model[0]._weight_quantizer.amax[1] == 0
    assert torch.equal(model(x)[:, 1], torch.full((2, 4, 4), beta))


def test_uncalibrated_layers_are_ready_for_calibration():
    model = trained(
        nn.Sequential(
            nn.BatchNorm2d(3),
            quantized("Conv2d", 3, 4, 3, quant_desc_weight=PER_TENSOR),
            nn.BatchNorm2d(4),
            quantized("ConvTranspose2d", 4, 6, 3, groups=2),
            nn.BatchNorm2d(6),
        )
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    collected = model[3]._weight_quantizer
    collected.collect(model[3].weight)
    report = fold_batchnorm(model, x)
    assert [(p.layer, p.batch_norm) for p in report.pairs] == [("1", "0"), ("1", "2"), ("3", "4")]
    assert all(q.amax is None for q in named_quantizers(model).values())
    assert collected.calibrator.compute_amax() is None
    assert [model[1]._weight_quantizer.axis, model[3]._weight_quantizer.axis] == [0, None]
    calibrate(model, [x], "percentile", progress=False)
    compute_amax(model, "max")
    expected = reference.amax_of(model[1].weight.detach().numpy(), 0)
    assert np.array_equal(model[1]._weight_quantizer.amax.numpy(), expected)


def with_weight(**keywords):
    return {"quant_desc_weight": QuantDescriptor(**keywords)}


KEPT = {
    "fixed": (with_weight(amax=0.5), 0),
    "fp8": (with_weight(num_bits=(4, 3), amax=0.5), 0),
    "list": (with_weight(axis=0, amax=[0.4, 0.5, 0.6, 0.7, 0.8, 0.9]), 0),
    "one value": (with_weight(axis=0, amax=0.5), 0),
    "two axes": (with_weight(axis=(0, 1), amax=np.linspace(0.4, 0.9, 48).reshape(6, 8)), (0, 1)),
    "negative axis": (with_weight(axis=-2, amax=0.5), -2),
    "blocks": (with_weight(num_bits=4, axis=1, block_size=4), 1),
}


@pytest.mark.parametrize("case", KEPT)
def test_other_ranges_follow(case):
    keywords, axis = KEPT[case]
    model = trained(nn.Sequential(quantized("Linear", 8, 6, **keywords), nn.BatchNorm1d(6))).eval()
    calibrate(model, [torch.randn(4, 8)], progress=False)
    layer = model[0]
    factor = model[1].weight.detach() / torch.sqrt(model[1].running_var + model[1].eps)
    expected = layer._weight_quantizer(layer.weight).detach() * factor[:, None]
    report = fold_batchnorm(model, torch.randn(4, 8))
    assert len(report.pairs) == 1 and layer._weight_quantizer.axis == axis
    found = layer._weight_quantizer(layer.weight).detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


UNFIT = {
    "learned": (with_weight(learn_amax=True, amax=1.0), "has a learned range"),
    "dynamic": (with_weight(dynamic=True), "has a dynamic range"),
    "unsigned": (with_weight(unsigned=True, amax=1.0), "is unsigned"),
    "other axis": (with_weight(axis=1), "it has one for all"),
    "blocks": (with_weight(axis=0, block_size=2), "a block of it holds several"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_ranges_that_cannot_follow(case):
    keywords, reason = UNFIT[case]
    model = trained(nn.Sequential(quantized("Linear", 8, 6, **keywords), nn.BatchNorm1d(6)))
    x = torch.randn(4, 8)
    calibrate(model, [x], progress=False)
    before, modules = state(model), list(model.modules())
    report = fold_batchnorm(model, x)
    assert not report.pairs and reason in report.skipped[0][1]
    assert_unchanged(model, before, modules)


def test_calibrated_layers_that_cannot_follow():
    model = trained(
        nn.Sequential(
            quantized("ConvTranspose2d", 4, 6, 3, groups=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.BatchNorm2d(6),
            quantized("Conv2d", 6, 3, 3),
        )
    )
    x = torch.randn(2, 4, 6, 6)
    calibrate(model, [x], progress=False)
    reasons = dict(fold_batchnorm(model, x).skipped)
    assert "has no axis of output channels" in reasons["1"]
    assert "the range of 4._weight_quantizer would no longer fit" in reasons["3"]


def test_shared_weight_quantizer_stays():
    model = small_net()
    model[3]._weight_quantizer = model[0]._weight_quantizer
    report = fold_batchnorm(model, torch.randn(2, 3, 12, 12))
    assert [pair.layer for pair in report.pairs] == ["6", "11"]
    assert "0._weight_quantizer quantizes other tensors, too" in str(report)


def test_quantizers_roll_back():
    model = PlainList()
    model.first[0] = quantized("Conv2d", 3, 4, 1, quant_desc_weight=PER_TENSOR)
    x = torch.randn(2, 3, 4, 4)
    calibrate(trained(model).eval(), [x], progress=False)
    before = state(model)
    with pytest.raises(RuntimeError, match="norm folded into conv"):
        fold_batchnorm(model, x)
    assert model.first[0]._weight_quantizer.axis is None
    assert_unchanged(model, before, list(model.modules()))


def nodes(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def test_export_holds_no_batch_norm(tmp_path):
    model = small_net(per_tensor=True)
    x = torch.randn(2, 3, 12, 12)
    calibrate(model, [x], progress=False)
    export_onnx(model, x, tmp_path / "before.onnx")
    assert nodes(tmp_path / "before.onnx").count("BatchNormalization") == 4
    fold_batchnorm(model, x)
    report = export_onnx(model, x, tmp_path / "after.onnx")
    assert "BatchNormalization" not in nodes(tmp_path / "after.onnx")
    assert report.integer_weights == 4
    (found,) = run(tmp_path / "after.onnx", x.numpy())
    expected = model(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_placed_models_need_no_inputs():
    model = small_net()
    x = torch.randn(2, 3, 12, 12)
    expected = model(x).detach()
    report = _fold(model, record(model, x))
    assert len(report.pairs) == 4
    found = model(x).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


# Freezing


def frozen_net():
    return freeze_batchnorm(
        trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)))
    )


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def again(model):
    return freeze_batchnorm(model)


@pytest.mark.parametrize("made", [lambda model: model, copied, pickled, again])
def test_frozen_stays_in_eval_mode(made):
    model = made(frozen_net())
    x = torch.randn(8, 3, 6, 6)
    expected = model.eval()(x)
    before = state(model)
    model.train()
    assert model.training and model[0].training
    assert not model[1].training and not model[2].training
    assert torch.equal(model(x), expected)
    assert_unchanged(model, before, list(model.modules()))
    model(x).square().sum().backward()
    assert model[1].weight.grad.any() and model[1].bias.grad.any()


def test_frozen_is_the_same_module():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    norm, before = model[1], state(model)
    assert freeze_batchnorm(model) is model and model[1] is norm
    assert isinstance(norm, nn.BatchNorm2d)
    assert type(frozen_net()[1]) is type(norm) and type(copied(model)[1]) is type(norm)
    assert type(norm).__mro__[2] is nn.BatchNorm2d and repr(norm).startswith("FrozenBatchNorm2d(4")
    assert list(model.state_dict()) == list(before)
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    fresh.load_state_dict(model.state_dict())
    folded(model.double(), torch.randn(2, 3, 6, 6).double(), ["0"])


def test_nothing_to_freeze():
    model = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3, track_running_stats=True),
    )
    freeze_batchnorm(model).train()
    assert model[0].training and model[1].training


def test_frozen_exports_in_train_mode():
    model = frozen_net()[:2].train()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    assert not program.graph_signature.buffers_to_mutate
