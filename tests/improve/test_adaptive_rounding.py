"""Adaptive rounding: the formulas, the codes it leaves, and what it must not touch."""

import copy
import io
import itertools
from collections import Counter

import numpy as np
import onnx_runs
import pytest
import reference
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pytorch_quant import quant_modules
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.export import export_onnx
from pytorch_quant.improve import adaptive_rounding as module
from pytorch_quant.improve import rounding
from pytorch_quant.improve.adaptive_rounding import adaround
from pytorch_quant.nn import QuantConv2d, QuantConvTranspose2d, QuantLinear, TensorQuantizer
from pytorch_quant.ptq import calibrate, compute_amax

QUICK = {"iterations": 150, "learning_rate": 0.03, "progress": False}
PER_TENSOR = QuantDescriptor(4)


def kept(axis, bits=4, **options):
    return {"quant_desc_weight": QuantDescriptor(bits, axis=axis, **options)}


class Network(nn.Module):
    """Layers are registered in another order than they run in; `twice` runs two times."""

    def __init__(self):
        super().__init__()
        self.head = QuantLinear(36, 3, **kept(0))
        self.twice = QuantConv2d(4, 4, 3, padding=1, padding_mode="reflect", **kept(None))
        self.norm = nn.BatchNorm2d(4)
        self.stem = QuantConv2d(2, 4, 3, stride=2, padding=1, **kept(0))

    def forward(self, x):
        x = self.norm(self.stem(x)).relu_()
        x = self.twice(self.twice(x).relu_())
        return self.head(x.flatten(1))


def batches_of(*shape, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Correlated inputs, as real ones are; for white noise nearest rounding is the best there is.
    images = [torch.randn(8, *shape, generator=generator) for _ in range(count)]
    return [x + 2 * torch.randn(8, *[1] * len(shape), generator=generator) for x in images]


def calibrated(model, batches):
    for p in model.parameters():
        p.data += 0.02
    calibrate(model.eval(), batches, progress=False)
    return model


def network():
    batches = batches_of(2, 6, 6)
    return calibrated(Network(), batches), batches


def codes_of(weight, amax, bits=4, narrow=False):
    return reference.codes(weight.detach().float().numpy(), amax.numpy(), bits, narrow=narrow)


def same_state(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def test_rectified_sigmoid_and_regularizer_are_those_of_the_paper():
    v = np.linspace(-6, 6, 101)
    h = np.clip(1 / (1 + np.exp(-v)) * (1.1 - -0.1) + -0.1, 0, 1)
    got = rounding.rectified_sigmoid(torch.from_numpy(v))
    np.testing.assert_allclose(got.numpy(), h, atol=1e-12)
    assert h[0] == 0 and h[-1] == 1 and got[0] == 0 and got[-1] == 1
    for beta in (20.0, 7.3, 2.0):
        wanted = np.sum(1 - np.abs(2 * h - 1) ** beta)
        np.testing.assert_allclose(rounding.rounding_regularizer(got, beta).item(), wanted)
    part = torch.linspace(0, 1, 33, dtype=torch.float64)
    again = rounding.rectified_sigmoid(rounding.inverse_rectified_sigmoid(part))
    torch.testing.assert_close(again, part)
    betas = [rounding.annealed_beta(done / 10, (20, 2)) for done in range(11)]
    assert betas[0] == 20 and betas[10] == 2 and betas == sorted(betas, reverse=True)
    assert betas[5] == pytest.approx(11)


KINDS = {
    "conv": (
        lambda: QuantConv2d(3, 5, 3, padding=1, padding_mode="circular", **kept(0)),
        (3, 5, 5),
    ),
    "conv_per_tensor_same": (
        lambda: QuantConv2d(3, 5, 3, padding="same", bias=False, **kept(None)),
        (3, 5, 5),
    ),
    "grouped": (lambda: QuantConv2d(4, 8, 3, groups=2, **kept(0)), (4, 5, 5)),
    "narrow": (lambda: QuantConv2d(3, 5, 2, **kept(0, narrow_range=True)), (3, 5, 5)),
    "transposed": (lambda: QuantConvTranspose2d(4, 5, 3, stride=2, **kept(1)), (4, 3, 3)),
    "transposed_grouped": (
        lambda: QuantConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1, **kept(None)),
        (4, 3, 3),
    ),
    "linear": (lambda: QuantLinear(24, 6, **kept(0)), (24,)),
    "linear_tokens": (lambda: QuantLinear(24, 6, **kept(None)), (5, 24)),
    "linear_8_bit": (lambda: QuantLinear(24, 6, **kept(0, bits=8)), (24,)),
    "linear_blocks": (lambda: QuantLinear(24, 6, **kept(1, block_size=8)), (24,)),
    "amax_clips": (lambda: QuantLinear(24, 6, **kept(None, amax=0.1)), (24,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_lies_on_the_grid_and_the_quantizer_gives_the_learned_codes(kind):
    make, shape = KINDS[kind]
    batches = batches_of(*shape)
    model = calibrated(nn.Sequential(make()), batches)
    layer, before = model[0], model[0].weight.detach().clone()
    quantizer, parameter = layer._weight_quantizer, layer.weight
    bits, narrow = quantizer.num_bits, quantizer.narrow_range
    amax = quantizer.amax.clone()
    per_weight = amax
    if quantizer._block_size:
        per_weight = amax.reshape(6, 3).repeat_interleave(8, 1)
    nearest = codes_of(before, per_weight, bits, narrow)
    report = adaround(model, batches, **QUICK)
    (row,) = report.layers
    assert layer.weight is parameter and torch.equal(quantizer.amax, amax)
    learned = codes_of(layer.weight, per_weight, bits, narrow)
    scale = per_weight.numpy() / np.float32(2 ** (bits - 1) - 1)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), learned * scale)
    np.testing.assert_array_equal(quantizer(layer.weight).detach().numpy(), learned * scale)
    assert np.abs(learned - nearest).max() == 1
    assert learned.min() >= -(2 ** (bits - 1)) + narrow and learned.max() <= 2 ** (bits - 1) - 1
    assert row.changed == (learned != nearest).sum() > 0 and row.weights == learned.size
    assert row.learned > row.nearest + (0.05 if bits == 8 else 0.5) and not row.kept_nearest
    # What the report says is the error of the quantized layer against the float one.
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    for weight, told in ((before, row.nearest), (layer.weight.detach().clone(), row.learned)):
        parameter.data.copy_(weight)
        got = torch.cat([model(x) for x in batches])
        for q in quantizers:
            q.disable()
        parameter.data.copy_(before)
        wanted = torch.cat([model(x) for x in batches])
        for q in quantizers:
            q.enable()
        noise = (got - wanted).square().sum() / wanted.square().sum()
        assert told == pytest.approx(-10 * np.log10(noise.item()), abs=1e-3)


def test_it_comes_close_to_the_best_of_all_roundings():
    batches = batches_of(4, 5, 5)
    model = calibrated(
        nn.Sequential(QuantConv2d(4, 8, 3, groups=4, bias=False, **kept(0))), batches
    )
    layer, x = model[0], torch.cat(batches)
    weight = layer.weight.detach().reshape(8, 9, 1).numpy().astype(np.float64)
    step = layer._weight_quantizer.amax.reshape(8, 1, 1).numpy().astype(np.float64) / 7
    x_hat = layer._input_quantizer(x)
    patches, patches_hat = (
        nn.functional.unfold(t, 3).reshape(len(x), 4, 9, 9).movedim(1, 0).double().numpy()
        for t in (x, x_hat)
    )
    ways = np.array(list(itertools.product([0, 1], repeat=9))).T
    power = best = 0.0
    for k in range(8):
        wanted = np.einsum("ncp,co->npo", patches[k // 2], weight[k])
        tried = np.clip(np.floor(weight[k] / step[k]) + ways, -8, 7) * step[k]
        got = np.einsum("ncp,co->npo", patches_hat[k // 2], tried)
        best += ((got - wanted) ** 2).sum((0, 1)).min()
        power += (wanted**2).sum()
    optimum = 10 * np.log10(power / best)
    (row,) = adaround(model, batches, progress=False).layers
    assert row.nearest + 1 < optimum
    assert optimum - 0.35 <= row.learned <= optimum + 1e-3


def test_the_unit_of_the_activations_does_not_matter():
    codes = []
    for unit in (1.0, 2.0**12):
        torch.manual_seed(0)
        batches = [unit * x for x in batches_of(24)]
        model = calibrated(nn.Sequential(QuantLinear(24, 6, bias=False, **kept(0))), batches)
        adaround(model, batches, **QUICK)
        codes.append(model[0].weight.detach())
    assert torch.equal(*codes)


def test_codes_outlive_calibration_copies_and_state_dicts():
    model, batches = network()
    layers = ["stem", "twice", "head"]
    for name in layers:
        # A grid whose largest code is not in use, which a new calibration would therefore narrow.
        model.get_submodule(name)._weight_quantizer.amax *= 1.3
    adaround(model, batches, **QUICK)
    amax = {n: model.get_submodule(n)._weight_quantizer.amax.clone() for n in layers}
    weights = {n: model.get_submodule(n).weight.detach().clone() for n in layers}
    again = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for one in (model, again, torch.load(stream, weights_only=False)):
        calibrate(one, batches_of(2, 6, 6, seed=1), "mse", weight_method="mse", progress=False)
        compute_amax(one, "percentile", weight_method="percentile", percentile=90.0)
        for name in layers:
            layer = one.get_submodule(name)
            assert torch.equal(layer._weight_quantizer.amax, amax[name])
            assert torch.equal(layer._weight_quantizer(layer.weight), weights[name])
    fresh = Network().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(batches[0]), model(batches[0]))


def test_the_exported_file_gives_the_outputs_of_the_fake_quantized_model(tmp_path):
    model, batches = network()
    model.twice.padding_mode = "zeros"
    adaround(model, batches, **QUICK)
    wanted = model(batches[0]).detach().numpy()
    export_onnx(model, batches[0], tmp_path / "model.onnx")
    (got,) = onnx_runs.run(tmp_path / "model.onnx", batches[0].numpy())
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def spied(monkeypatch):
    seen = {}

    def spy(name, layer, samples, *rest):
        seen[name] = samples
        return rounding.learn_layer(name, layer, samples, *rest)

    monkeypatch.setattr(module, "learn_layer", spy)
    return seen


def test_layers_see_rounded_inputs_and_float_targets_of_every_call(monkeypatch):
    model, batches = network()
    real = copy.deepcopy(model)
    for q in real.modules():
        if isinstance(q, TensorQuantizer):
            q.disable()
    seen = spied(monkeypatch)
    report = adaround(model, batches, **QUICK)
    assert [row.name for row in report.layers] == ["stem", "twice", "head"] == list(seen)
    nearest = copy.deepcopy(real)
    for q in nearest.modules():
        if isinstance(q, TensorQuantizer):
            q.enable()

    def calls(net, stem, twice):
        """Inputs and outputs of `twice`, with the weights that are given."""
        net = copy.deepcopy(net)
        net.stem.weight.data, net.twice.weight.data = stem, twice
        found = []
        net.twice.register_forward_hook(
            lambda layer, args, out: found.append(
                (layer._input_quantizer(args[0]).clone(), out.clone())
            )
        )
        for x in batches:
            net(x)
        return found

    # While `twice` is learned, its own first call still rounds to nearest.
    hats = calls(nearest, model.stem.weight.data, real.twice.weight.data)
    reals = calls(real, real.stem.weight.data, real.twice.weight.data)
    (sample,) = seen["twice"]
    assert len(sample.inputs) == 2 * 4 * 8
    torch.testing.assert_close(sample.inputs, torch.cat([x for x, _ in hats]), atol=0, rtol=0)
    torch.testing.assert_close(sample.targets, torch.cat([y for _, y in reals]))


def test_samples_are_bounded_and_a_pass_ends_at_its_layer(monkeypatch):
    model, batches = network()
    seen, runs = spied(monkeypatch), Counter()
    for name in ("stem", "twice", "head"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda *_, name=name: runs.update([name]))
    adaround(model, batches, samples=10, **QUICK)
    assert {n: len(s[0].inputs) for n, s in seen.items()} == dict.fromkeys(seen, 10)
    # One survey; then for `twice` and for `head` a float and a quantized pass at most.
    assert runs["head"] == 4 and runs["stem"] <= 4 * (1 + 4) and runs["twice"] <= 8 * (1 + 2) + 8


def test_shapes_may_differ_from_batch_to_batch(monkeypatch):
    batches = [*batches_of(3, 5, 5, count=2), *batches_of(3, 7, 6, count=1), torch.randn(3, 5, 5)]
    model = calibrated(nn.Sequential(QuantConv2d(3, 4, 3, **kept(0))), batches)
    seen = spied(monkeypatch)
    (row,) = adaround(model, batches, **QUICK).layers
    shapes = [tuple(sample.inputs.shape) for sample in seen["0"]]
    assert sorted(shapes) == [(8, 3, 7, 6), (17, 3, 5, 5)] and row.learned > row.nearest


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = QuantConvTranspose2d(3, 4, 3, stride=2, **kept(1))

    def forward(self, x):
        return self.up(input=x, output_size=[8, 8])


def test_the_other_arguments_of_a_layer_are_kept(monkeypatch):
    batches = batches_of(3, 3, 3)
    model = calibrated(Upsampling(), batches)
    seen = spied(monkeypatch)
    (row,) = adaround(model, batches, **QUICK).layers
    assert tuple(seen["up"][0].targets.shape) == (32, 4, 8, 8) and row.learned > row.nearest


@pytest.mark.slow
def test_two_runs_are_alike_and_the_global_random_state_stays():
    model, batches = network()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    states = []
    for seed in (0, 0, 1):
        one = copy.deepcopy(model)
        adaround(one, batches, samples=12, seed=seed, **QUICK)
        states.append(one.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert same_state(*states[:2]) and not same_state(*states[1:])
    loader = DataLoader(TensorDataset(torch.cat(batches)), batch_size=8, shuffle=True)
    reports = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        one = copy.deepcopy(model)
        reports.append(adaround(one, loader, forward=lambda m, b: m(b[0]), **QUICK))
    assert reports[0] == reports[1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_everything_as_it_was(error):
    model, batches = network()
    model.train()
    model.stem._input_quantizer.enable_calib()
    parameter, before = model.stem.weight, copy.deepcopy(model.state_dict())
    storage, modes = parameter.data_ptr(), quantizer_modes(model)
    rng, calls = torch.get_rng_state(), []

    def forward(net, batch):
        calls.append(not torch.equal(net.stem.weight, before["stem.weight"]))
        if any(calls) and len(calls) > 16:
            raise error("stop")
        return net(batch)

    with pytest.raises(error, match="stop"):
        adaround(model, batches, forward=forward, **QUICK)
    assert any(calls), "the failure came before a layer was rounded"
    assert same_state(model.state_dict(), before) and model.stem.weight is parameter
    assert parameter.data_ptr() == storage and quantizer_modes(model) == modes
    assert not any(q.fixed for q in model.modules() if isinstance(q, TensorQuantizer))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def quantizer_modes(model):
    return [
        (q._disabled, q._if_quant, q._if_clip, q._if_calib)
        for q in model.modules()
        if isinstance(q, TensorQuantizer)
    ]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_flags_gradients_and_modes_are_as_before_under_any_grad_mode(context):
    model, batches = network()
    wanted = copy.deepcopy(model)
    adaround(wanted, batches, **QUICK)
    model.train()
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    storages = {n: p.data_ptr() for n, p in model.named_parameters()}
    collecting = model.twice._input_quantizer
    collecting.calibrator.reset()
    collecting.enable_calib()
    modes, hooks = quantizer_modes(model), []
    model.twice.register_forward_hook(lambda *_: hooks.append(1))
    with context():
        adaround(model, batches, **QUICK)
    assert same_state(model.state_dict(), wanted.state_dict())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == storages
    assert all(p.requires_grad == (n != "stem.weight") for n, p in model.named_parameters())
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "head.weight")
    assert all(m.training for m in model.modules()) and quantizer_modes(model) == modes
    assert collecting.calibrator.compute_amax() is None
    # A hook sees the passes over the batches, not the iterations.
    assert len(model.twice._forward_hooks) == 1 and len(hooks) < 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_precisions_keep_the_learned_codes(dtype, bits, monkeypatch):
    batches = [x.to(dtype) for x in batches_of(24)]
    model = nn.Sequential(QuantLinear(24, 6, **kept(0, bits))).to(dtype)
    calibrated(model, batches)
    layer, before = model[0], model[0].weight.detach().clone()
    learned = {}
    original = rounding.learn_codes

    def keep(*arguments):
        learned["codes"] = original(*arguments)
        return learned["codes"]

    monkeypatch.setattr(rounding, "learn_codes", keep)
    report = adaround(model, batches, **QUICK)
    assert report.layers[0].changed and layer.weight.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert learned["codes"].dtype == wide
    bound = 2 ** (bits - 1) - 1
    scale = (layer._weight_quantizer.amax / bound).to(dtype).to(wide)
    got = (layer.weight.detach().to(wide) / scale).round().clamp(-bound - 1, bound)
    assert torch.equal(got, learned["codes"])
    assert torch.equal(layer._weight_quantizer(layer.weight), layer.weight)
    assert not torch.equal(got, (before.to(wide) / scale).round().clamp(-bound - 1, bound))


def test_nearest_is_kept_where_learning_does_not_help():
    model, batches = network()
    before = copy.deepcopy(model.state_dict())
    report = adaround(model, batches, iterations=2, learning_rate=1e-9, progress=False)
    assert all(row.kept_nearest and row.changed == 0 for row in report.layers)
    assert same_state(model.state_dict(), before) and not model.stem._weight_quantizer.fixed
    assert str(report).count("nearest kept") == 3


class Obstacles(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.tied = QuantLinear(6, 5, **kept(0))
        self.tied.weight = self.embedding.weight
        self.float8 = QuantLinear(5, 5, **kept(None, bits=(4, 3)))
        self.wide = QuantLinear(5, 5, **kept(0, bits=16))
        self.ranged = QuantLinear(5, 5, quant_desc_weight=QuantDescriptor(8, dynamic=True))
        self.off = QuantLinear(5, 5, **kept(0))
        self.off._weight_quantizer.disable()
        self.normed = nn.utils.parametrizations.weight_norm(QuantLinear(5, 5, **kept(0)))
        self.plain = QuantLinear(5, 5, **kept(0))
        self.unused = QuantLinear(5, 5, **kept(0, amax=1.0))
        self.unused._input_quantizer.disable()

    def forward(self, x):
        x = self.off(self.ranged(self.wide(self.float8(self.tied(x)))))
        return self.plain(self.normed(x))


def test_what_cannot_be_learned_is_skipped_with_the_reason():
    batches = batches_of(6)
    model = calibrated(Obstacles(), batches)
    before = copy.deepcopy(model.state_dict())
    report = adaround(model, batches, **QUICK)
    assert [row.name for row in report.layers] == ["plain"]
    reasons = {
        "tied": "also embedding.weight",
        "float8": "is e4m3",
        "wide": "is int16",
        "ranged": "not a constant",
        "off": "disabled",
        "normed": "does not see a parameter",
        "unused": "do not reach it",
    }
    assert report.skipped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.skipped[name]
        assert f"{name}: skipped, " in str(report)
    after = model.state_dict()
    assert {k for k in after if not torch.equal(after[k], before[k])} == {"plain.weight"}


def test_layers_restricts_by_name_and_glob():
    model, batches = network()
    one = copy.deepcopy(model)
    report = adaround(one, batches, layers="stem", **QUICK)
    assert [row.name for row in report.layers] == ["stem"] and not report.skipped
    assert torch.equal(one.head.weight, model.head.weight)
    report = adaround(model, batches, layers=["?wice", "head"], **QUICK)
    assert [row.name for row in report.layers] == ["twice", "head"]
    with pytest.raises(ValueError, match=r"'steam' matches no .*near names: stem"):
        adaround(model, batches, layers=["steam"], **QUICK)


def test_wrong_use_is_refused():
    model, batches = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="empty after one pass"):
        adaround(model, iter(batches), **QUICK)
    with pytest.raises(TypeError, match="one tensor"):
        adaround(model, batches[0], **QUICK)
    with pytest.raises(ValueError, match="no batches"):
        adaround(model, [], **QUICK)
    with pytest.raises(ValueError, match="no quantized convolution"):
        adaround(nn.Linear(2, 2), batches, **QUICK)
    for name, value in (
        ("iterations", 0),
        ("batch_size", 1.5),
        ("samples", True),
        ("learning_rate", 0.0),
        ("warm_up", 1.0),
        ("beta", (2, 20)),
        ("beta", (2, 0.5)),
        ("regularization", -1.0),
    ):
        with pytest.raises(ValueError, match=name):
            adaround(model, batches, **QUICK | {name: value})
    assert same_state(model.state_dict(), before)
    model.head._input_quantizer.amax = None
    with pytest.raises(RuntimeError, match=r"1 uncalibrated .*head\._input_quantizer"):
        adaround(model, batches, **QUICK)


class Longer(nn.Module):
    """Shows its layer more rows where it is quantized."""

    def __init__(self):
        super().__init__()
        self.layer = QuantLinear(6, 5, **kept(0))

    def forward(self, x):
        real = self.layer._input_quantizer.disabled
        return self.layer(x if real else torch.cat([x, x]))


def test_inputs_that_cannot_be_compared_are_an_error():
    batches = batches_of(6)
    model = calibrated(Longer(), batches)
    with pytest.raises(RuntimeError, match=r"layer gets inputs of .* leave it out"):
        adaround(model, batches, **QUICK)


def test_progress_counts_layers_times_iterations(capsys):
    model, batches = network()
    adaround(model, batches, iterations=5)
    shown = capsys.readouterr().err
    assert "15/15" in shown and "adaround" in shown and "head" in shown
    adaround(model, batches, iterations=5, progress=False)
    assert not capsys.readouterr().err


def separable(width=6):
    """Depthwise and narrow: one weight range for all channels costs it much at 4 bits."""

    def block(inputs, outputs, *arguments, **options):
        conv = nn.Conv2d(inputs, outputs, *arguments, **options)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    with quant_modules.initialize():
        return nn.Sequential(
            *block(1, width, 3, stride=2, padding=1),
            *block(width, width, 3, padding=1, groups=width),
            *block(width, 2 * width, 1),
            *block(2 * width, 2 * width, 3, stride=2, padding=1, groups=2 * width),
            *block(2 * width, 2 * width, 1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )


@pytest.mark.slow
def test_at_four_bits_it_halves_the_loss_of_accuracy():
    pytest.importorskip("sklearn")
    from pytorch_quant.demo.digits import load_digits
    from pytorch_quant.demo.training import predict, top1, train

    data, tests = load_digits()
    model = separable()
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    for q in quantizers:
        q.disable()
    train(model, data, 6, 2e-2, "train")
    real = top1(predict(model, tests, "float"), tests)
    for q in quantizers:
        q.enable()
    for layer in model.modules():
        if hasattr(layer, "_weight_quantizer"):
            layer._weight_quantizer.num_bits = 4
            layer._weight_quantizer.axis = None
    batches = [data[i] for i in range(8)]
    calibrate(model, batches, progress=False)
    nearest = top1(predict(model, tests, "nearest"), tests)
    report = adaround(model, batches, iterations=300, progress=False)
    learned = top1(predict(model, tests, "learned"), tests)
    assert real - nearest >= 5
    assert real - learned <= (real - nearest) / 2
    assert len(report.layers) == 6 and all(row.learned > row.nearest for row in report.layers)
