import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pytorch_quant import (
    CalibrationError,
    QuantDescriptor,
    TensorQuantizer,
    calibrate,
    compute_amax,
    quant_modules,
)
from pytorch_quant import nn as quant_nn
from pytorch_quant.calib import HistogramCalibrator, MaxCalibrator


def network():
    with quant_modules.initialize():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )


def quantizers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def images(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 1, 6, 6, generator=generator) for _ in range(count)]


def inputs_of(model, layer, batches):
    """What reaches a layer of the float model, found with a hook."""
    seen = []
    for q in quantizers(model).values():
        q.disable()
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.eval()
    for x in batches:
        model(x)
    hook.remove()
    for q in quantizers(model).values():
        q.enable()
    return torch.cat(seen).numpy()


def test_max_calibration_takes_the_maxima_of_float_activations_and_of_weights():
    model, batches = network(), images()
    report = calibrate(model, batches, progress=False)
    for layer in (model[0], model[4]):
        seen = inputs_of(model, layer, batches)
        assert layer._input_quantizer.amax.item() == np.abs(seen).max()
        weight = layer.weight.detach().numpy()
        np.testing.assert_array_equal(layer._weight_quantizer.amax, reference.amax_of(weight, 0))
    assert [row.name for row in report.ranges] == list(quantizers(model))
    assert report.unreached == [] and report.batches == 3
    assert "0._input_quantizer" in str(report) and "(4 channels)" in str(report)


def test_histograms_serve_every_method_without_another_pass():
    model, batches = network(), images()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    calibrate(model, batches, "entropy", progress=False)
    assert len(calls) == 3
    seen = inputs_of(model, model[4], batches)
    calls.clear()
    q = model[4]._input_quantizer
    amax = {}
    for method, options in (
        ("max", {}),
        ("percentile", {"percentile": 99.0}),
        ("percentile", {"percentile": 50.0}),
        ("mse", {}),
        ("entropy", {}),
    ):
        report = compute_amax(model, method, **options)
        amax[method, options.get("percentile")] = q.amax.item()
        row = next(r for r in report.ranges if r.name == "4._input_quantizer")
        assert row.method == method and row.amax == q.amax
        assert next(r for r in report.ranges if "_weight_" in r.name).method == "max"
    assert not calls
    width = q.calibrator._calib_bin_edges[1].item()
    assert amax["max", None] == np.abs(seen).max()
    for percentile in (99.0, 50.0):
        values = np.sort(np.abs(seen).ravel())
        k = int(percentile / 100 * len(values))
        got = amax["percentile", percentile]
        assert values[k - 1] - width <= got <= values[k + 1] + width
    assert len(set(amax.values())) >= 4


def test_max_keeps_no_histograms():
    model = network()
    calibrate(model, images(), "max", progress=False)
    assert all(type(q.calibrator) is MaxCalibrator for q in quantizers(model).values())
    with pytest.raises(ValueError, match=r"only maxima were collected by 0\._input_quantizer, 4"):
        compute_amax(model, "entropy")
    calibrate(model, images(), "mse", progress=False)
    kinds = {n: type(q.calibrator) for n, q in quantizers(model).items()}
    assert kinds["0._input_quantizer"] is HistogramCalibrator
    assert kinds["0._weight_quantizer"] is MaxCalibrator


def test_weight_method():
    model = network()
    model[4]._weight_quantizer.num_bits = 3
    calibrate(model, images(), weight_method="mse", progress=False)
    amax = model[4]._weight_quantizer.amax.flatten()
    weight = model[4].weight.detach().abs()
    assert (amax <= weight.amax(1)).all() and (amax < weight.amax(1)).any()


def test_weights_follow_training_without_data():
    model = network()
    calibrate(model, images(), progress=False)
    with torch.no_grad():
        model[4].weight.mul_(2)
    compute_amax(model, "max")
    np.testing.assert_array_equal(
        model[4]._weight_quantizer.amax, reference.amax_of(model[4].weight.detach().numpy(), 0)
    )


def test_starts_afresh_unless_asked_to_accumulate():
    model, (small, large) = network(), (images(1)[0], images(1)[0] * 10)
    first = model[0]._input_quantizer
    calibrate(model, [large], progress=False)
    calibrate(model, [small], progress=False)
    assert first.amax == small.abs().max()
    calibrate(model, [large], progress=False, accumulate=True)
    assert first.amax == large.abs().max()
    calibrate(model, [small], progress=False, accumulate=True)
    assert first.amax == large.abs().max()
    with pytest.raises(ValueError, match="accumulate=False"):
        calibrate(model, [small], "mse", progress=False, accumulate=True)


def test_modes_come_back():
    model = network()
    model.train()
    model[1].eval()
    model[0]._weight_quantizer.disable()
    model[4]._input_quantizer.disable_quant()
    batch_norm = {k: v.clone() for k, v in model[1].state_dict().items()}
    before = {n: (m.training, repr(m).replace("dynamic", "")) for n, m in model.named_modules()}
    calibrate(model, images(), progress=False)
    after = {n: m.training for n, m in model.named_modules()}
    assert after == {n: training for n, (training, _) in before.items()}
    assert model[0]._weight_quantizer.disabled and model[0]._weight_quantizer.amax is None
    assert not model[4]._input_quantizer._if_quant and model[4]._weight_quantizer._if_quant
    assert not any(q._if_calib for q in quantizers(model).values())
    assert all(torch.equal(v, batch_norm[k]) for k, v in model[1].state_dict().items())


class Broken(Exception):
    pass


def test_modes_come_back_after_a_loader_that_raises():
    model = network()

    def loader():
        yield images(1)[0]
        raise Broken

    with pytest.raises(Broken):
        calibrate(model, loader(), progress=False)
    assert model.training
    assert all(q._if_quant and not q._if_calib for q in quantizers(model).values())
    compute_amax(model, "max")
    assert model[0]._input_quantizer.amax == images(1)[0].abs().max()


def test_fixed_and_dynamic_quantizers_are_left_alone():
    layer = quant_nn.QuantLinear(
        4, 4, quant_desc_input=QuantDescriptor(amax=6.0), quant_desc_weight=QuantDescriptor(axis=0)
    )
    other = quant_nn.QuantLinear(4, 4, quant_desc_input=QuantDescriptor(dynamic=True))
    report = calibrate(nn.Sequential(layer, other), [torch.randn(2, 4)], progress=False)
    assert layer._input_quantizer.amax == 6.0
    assert [r.method for r in report.ranges] == ["fixed", "max", "dynamic", "max"]


def test_learned_ranges_start_from_calibration():
    layer = quant_nn.QuantLinear(4, 4, quant_desc_input=QuantDescriptor(learn_amax=True))
    x = torch.randn(8, 4) * 5
    calibrate(layer, [x], progress=False)
    assert layer._input_quantizer.clip.clip_value_max == x.abs().max()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = quant_nn.QuantLinear(4, 4)
        self.unused = quant_nn.QuantLinear(4, 4)

    def forward(self, x, scale=1.0):
        return self.used(x) * scale


def test_what_was_not_reached_is_named():
    model = Branches()
    with pytest.warns(UserWarning, match=r"1 quantizer.* unused\._input_quantizer"):
        report = calibrate(model, [torch.randn(2, 4)], progress=False)
    assert report.unreached == ["unused._input_quantizer"]
    assert "not reached" in str(report)
    assert model.unused._weight_quantizer.amax is not None


def test_compute_amax_before_any_batch_names_every_quantizer():
    with pytest.raises(
        RuntimeError, match=r"seen no tensor: 0\._input_quantizer, 4\._input_quantizer; run calib"
    ):
        compute_amax(network(), "max")


def test_an_unknown_method_lists_the_valid_ones():
    for call in (
        lambda: calibrate(network(), images(), "entrpy"),
        lambda: calibrate(network(), images(), weight_method="entrpy"),
        lambda: compute_amax(network(), "entrpy"),
    ):
        with pytest.raises(
            ValueError, match=r"'entrpy'; use one of max, .*percentile, mse, entropy, lp"
        ):
            call()


def test_nan_names_the_quantizer_and_the_batch_and_keeps_earlier_statistics():
    model = network()
    good, bad = images(2)
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"calibration batch 1: 0\._input_quantizer: .*NaN"):
        calibrate(model, [good, bad], "mse", progress=False)
    compute_amax(model, "max")
    assert model[0]._input_quantizer.amax == good.abs().max()


def test_nan_in_a_weight_names_its_quantizer():
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"4\._weight_quantizer: "):
        calibrate(model, images(), progress=False)


def test_no_batches_no_quantizers_and_no_batch():
    with pytest.raises(ValueError, match="the loader is empty"):
        calibrate(network(), [], progress=False)
    with pytest.raises(ValueError, match="has no TensorQuantizer"):
        calibrate(nn.Linear(2, 2), images(), progress=False)
    with pytest.raises(TypeError, match=r"mapping of keywords.* got str"):
        calibrate(network(), ["image.png"], progress=False)


def test_a_batch_on_another_device():
    with pytest.raises(RuntimeError, match="the batch is on meta, the model on cpu"):
        calibrate(network(), [images(1)[0].to("meta")], progress=False)


def test_batches_in_every_form():
    x = torch.randn(6, 4)
    ranges = []
    for batches, forward in (
        ([x], None),
        ([(x, torch.zeros(6))], None),
        ([[x, torch.zeros(6)]], None),
        (DataLoader(TensorDataset(x, torch.zeros(6)), batch_size=2), None),
        ([{"x": x, "scale": 2.0}], None),
        ([{"image": x}], lambda model, batch: model(batch["image"])),
    ):
        model = Branches()
        with pytest.warns(UserWarning):
            calibrate(model, batches, forward=forward, progress=False)
        ranges.append(model.used._input_quantizer.amax.item())
    assert set(ranges) == {x.abs().max().item()}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = quant_nn.QuantLinear(4, 4), quant_nn.QuantLinear(4, 4)

    def forward(self, x, y):
        return self.a(x) + self.b(y)


def test_a_pair_is_two_arguments_where_the_model_takes_two():
    model, x, y = TwoInputs(), torch.randn(2, 4), torch.randn(2, 4) * 9
    calibrate(model, [(x, y)], progress=False)
    assert model.b._input_quantizer.amax == y.abs().max()
    wrapped = TwoInputs()
    calibrate(nn.DataParallel(wrapped), [(x, y)], progress=False)
    assert wrapped.b._input_quantizer.amax == y.abs().max()


def test_progress_bar_goes_to_stderr(capsys):
    calibrate(network(), images())
    out, err = capsys.readouterr()
    assert out == "" and "calibrate (max)" in err and "3/3" in err


def test_the_result_survives_a_checkpoint():
    model, x = network(), images(1)[0]
    calibrate(model, images(), "percentile", percentile=99.0, progress=False)
    model.eval()
    fresh = network().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("bad", [[], None])
def test_a_calibration_that_learns_nothing_keeps_what_was_there(bad):
    model, batches = network(), images()
    calibrate(model, batches, "mse", progress=False)
    with pytest.raises((CalibrationError, ValueError)):
        calibrate(model, bad if bad is not None else [batches[0] * torch.nan], progress=False)
    compute_amax(model, "entropy")
    compute_amax(model, "max")
    assert model[0]._input_quantizer.amax == torch.cat(batches).abs().max()


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("max", {"percentile": 99}, TypeError, "'max' has no option 'percentile'; .*: none"),
        ("mse", {"percentile": 99}, TypeError, "its options: start_bin, stride"),
        ("percentile", {"percentil": 99}, TypeError, "no option 'percentil'"),
        ("percentile", {"percentile": 101}, ValueError, "percentile=101 is out of range"),
        ("entropy", {"stride": 0}, ValueError, "stride=0 is out of range"),
    ],
)
def test_wrong_options_are_refused_before_any_batch(method, options, error, message):
    def loader():
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(error, match=message):
        calibrate(network(), loader(), method, progress=False, **options)


class Caching(nn.Module):
    """Keeps a tensor of its first forward pass, as detectors keep their anchors."""

    def __init__(self):
        super().__init__()
        self.layer, self.cache = quant_nn.QuantLinear(4, 4), None

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.ones(4) * 2
        return self.layer(x) * self.cache


def test_a_model_that_caches_tensors_trains_afterwards():
    model = Caching()
    calibrate(model, [torch.randn(2, 4)], progress=False)
    model(torch.randn(2, 4)).sum().backward()
    assert model.layer.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_parts_and_a_tensor_for_batches():
    model = nn.Sequential(torch.jit.script(nn.ReLU()), quant_nn.QuantLinear(4, 4))
    calibrate(model, [torch.randn(2, 4)], progress=False)
    with pytest.raises(TypeError, match=r"batches is one tensor of shape \(2, 4\)"):
        calibrate(model, torch.randn(2, 4), progress=False)


def test_a_weight_quantizer_shared_by_other_shapes():
    model = nn.Sequential(quant_nn.QuantLinear(4, 4), quant_nn.QuantLinear(4, 3))
    model[1]._weight_quantizer = model[0]._weight_quantizer
    with pytest.raises(ValueError, match=r"0\._weight_quantizer is shared by weights"):
        calibrate(model, [torch.randn(2, 4)], progress=False)


class Wrapper(nn.Module):
    """Has an attribute of the name that DataParallel uses."""

    def __init__(self):
        super().__init__()
        self.module = quant_nn.QuantLinear(4, 4)

    def forward(self, x, y):
        return self.module(x) + y


def test_a_submodule_called_module():
    calibrate(Wrapper(), [(torch.randn(2, 4), torch.zeros(2, 4))], progress=False)
