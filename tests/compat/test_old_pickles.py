"""Pickles whose classes have the module paths, and the attributes, of the old package."""

import pickle
import sys
import types

import numpy as np
import pytest
import reference
import torch
from former_package import Former
from torch import nn
from torch.nn import functional as F

from pytorch_quant.compat import alias, load_checkpoint


@pytest.fixture
def former(not_installed):
    return Former()


def load(path):
    alias.install_as_pytorch_quantization()
    return load_checkpoint(path, weights_only=False)


def test_a_whole_model_gives_the_same_outputs(former, tmp_path):
    model = nn.Sequential(
        former.layer("QuantConv2d", 3, 4, 3, 2, 1, x_amax=2.5),
        nn.ReLU(),
        former.layer("QuantAvgPool2d", 2, x_amax=3.0),
        nn.Flatten(),
        former.layer("QuantLinear", 16, 5, x_amax=1.5),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    conv, linear = model[0], model[4]

    def quantized(values, amax):
        return torch.from_numpy(reference.fake_quant(values.detach().numpy(), np.float32(amax)))

    weights = [
        quantized(m.weight, reference.amax_of(m.weight.detach().numpy(), 0)) for m in (conv, linear)
    ]
    y = F.conv2d(quantized(x, 2.5), weights[0], conv.bias, 2, 1).relu()
    y = F.avg_pool2d(quantized(y, 3.0), 2).flatten(1)
    wanted = F.linear(quantized(y, 1.5), weights[1], linear.bias).detach()

    loaded = load(former.save({"model": model}, tmp_path / "m.pt"))["model"]
    from pytorch_quant import nn as quant_nn

    kinds = [type(m) for m in loaded]
    assert kinds[0] is quant_nn.QuantConv2d and kinds[4] is quant_nn.QuantLinear
    torch.testing.assert_close(loaded(x).detach(), wanted, atol=1e-6, rtol=1e-6)
    # It is a model like any other.
    again = load(save_now(loaded, tmp_path / "again.pt"))
    torch.testing.assert_close(again(x), loaded(x), rtol=0, atol=0)
    assert "amax=2.5" in repr(loaded) and loaded.double().float()
    assert set(model.state_dict()) == set(loaded.state_dict())


def save_now(content, path):
    torch.save(content, path)
    return path


def test_fields_that_are_new(former, tmp_path):
    old = nn.ModuleList(
        [
            former.quantizer(),
            former.quantizer(amax=1.0, _scale_amax=2.0, _unsigned=True, _num_bits=4),
            former.quantizer((1, 0), np.ones((2, 3, 1))),
            former.quantizer(_disabled=True),
        ]
    )
    old[1].register_buffer("_pre_quant_scale", torch.tensor(3.0))
    old[3].register_buffer("_pre_scale", torch.tensor(5.0))
    plain, scaled, several, disabled = load(former.save(old, tmp_path / "q.pt"))
    x = torch.tensor([0.1, 0.5, 4.0])
    np.testing.assert_array_equal(plain(x), reference.fake_quant(x.numpy(), 4.0))
    wanted = reference.fake_quant(3 * x.numpy(), 2.0, 4, unsigned=True)
    np.testing.assert_array_equal(scaled(x), wanted)
    assert several.axis == (0, 1)
    assert several(torch.full((2, 3, 5), 9.0)).max() == 1.0
    np.testing.assert_array_equal(disabled(x), 5 * x)
    for quantizer in (plain, scaled, several, disabled):
        assert not quantizer.dynamic and not quantizer.fixed
        quantizer.amax = 1.0
        repr(quantizer)


def test_a_learned_range(former, tmp_path):
    old = former.quantizer(_learn_amax=True, _if_clip=True)
    old.clip = former.Clip()
    old.clip.clip_value_min = nn.Parameter(torch.tensor(-2.0))
    old.clip.clip_value_max = nn.Parameter(torch.tensor(2.0))
    x = torch.tensor([-3.0, 0.3, 1.0])
    loaded = load(former.save(old, tmp_path / "q.pt"))
    # The clip comes first: the lowest code is never reached.
    wanted = reference.fake_quant(np.clip(x.numpy(), -2, 2), 2.0)
    np.testing.assert_array_equal(loaded(x).detach(), wanted)


def test_a_half_precision_model(former, tmp_path):
    old = former.quantizer(amax=2.5).half()
    assert old._amax.dtype == torch.float16
    loaded = load(former.save(old, tmp_path / "q.pt")).float()
    assert loaded._amax.dtype == torch.float32 and loaded._amax == 2.5


def test_maxima_collected_so_far(former, tmp_path):
    empty = former.calibrator("MaxCalibrator", _calib_amax=None, _track_amax=False, _amaxs=None)
    full = former.calibrator(
        "MaxCalibrator",
        _calib_amax=torch.tensor(3.0),
        _track_amax=True,
        _amaxs=[np.float32(1.0), np.float32(3.0)],
    )
    old = nn.ModuleList([former.quantizer(calibrator=c) for c in (empty, full)])
    fresh, seen = load(former.save(old, tmp_path / "q.pt"))
    with pytest.raises(RuntimeError, match="Calibrator returned None"):
        fresh.load_calib_amax()
    seen.load_calib_amax()
    assert seen.amax == 3.0
    assert [float(a) for a in seen._calibrator.amaxs] == [1.0, 3.0]
    for quantizer in (fresh, seen):
        quantizer._calibrator.collect(torch.tensor([-4.0, 2.0]))
        quantizer.load_calib_amax()
        assert quantizer.amax == 4.0
        quantizer._calibrator.reset()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_histogram_collected_so_far(former, tmp_path, library):
    x = np.abs(np.random.default_rng(0).standard_normal(100_000)).astype(np.float32) * 0.7
    # As the old package had grown it: more bins than it began with, and a range of its own.
    counts, edges = np.histogram(x, bins=2600, range=(0, x.max()))
    if library == "torch":
        counts, edges = torch.from_numpy(counts).float(), torch.from_numpy(edges).float()
    fields = {"_num_bins": 2048, "_skip_zeros": False, "_grow_method": "append"}
    fields["_torch_hist"] = library == "torch"
    empty = former.calibrator(
        "HistogramCalibrator", _calib_hist=None, _calib_bin_edges=None, **fields
    )
    full = former.calibrator(
        "HistogramCalibrator", _calib_hist=counts, _calib_bin_edges=edges, **fields
    )
    old = nn.ModuleList([former.quantizer(calibrator=c) for c in (empty, full)])
    fresh, seen = load(former.save(old, tmp_path / "q.pt"))
    assert fresh._calibrator.compute_amax("mse") is None
    calibrator = seen._calibrator
    # One bin of the range [0, 4) that the statistics now have.
    width = 4 / 2048
    for percentile in (50, 99, 99.9):
        amax = calibrator.compute_amax("percentile", percentile=percentile)
        assert float(amax) == pytest.approx(np.percentile(x, percentile), abs=width)
    assert float(calibrator.compute_amax("max")) == pytest.approx(x.max(), abs=width)
    for method in ("mse", "entropy"):
        seen.load_calib_amax(method)
        assert 1.5 < seen.amax <= x.max() + width
    for quantizer in (fresh, seen):
        quantizer._calibrator.collect(torch.tensor([9.0]))
        assert quantizer._calibrator.compute_amax("max") == 9.0
    assert int(calibrator.histogram.seen) == len(x) + 1


def test_descriptors(former, tmp_path):
    old = former.ScaledQuantDescriptor()
    old.__dict__.update(
        _num_bits=4,
        _name="weights",
        _fake_quant=True,
        _axis=(0),
        _amax=np.array([1.0, 2.0], np.float32),
        _learn_amax=False,
        _scale_amax=None,
        _calib_method="histogram",
        _unsigned=False,
        _narrow_range=True,
    )
    loaded = load(former.save([old], tmp_path / "d.pt"))[0]
    from pytorch_quantization.tensor_quant import QuantDescriptor

    assert loaded == QuantDescriptor(
        num_bits=4,
        name="weights",
        axis=0,
        amax=[1.0, 2.0],
        calib_method="histogram",
        narrow_range=True,
    )
    assert hash(loaded) and pickle.loads(pickle.dumps(loaded)) == loaded


def test_a_pickle_is_refused_unless_trusted(former, tmp_path):
    path = former.save({"model": former.layer("QuantLinear", 2, 2)}, tmp_path / "m.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only=False to load_checkpoint"):
        load_checkpoint(path)
    with pytest.raises(ModuleNotFoundError, match="install_as_pytorch_quantization"):
        load_checkpoint(path, weights_only=False)
    assert load(path)["model"].in_features == 2


def test_errors_of_torch_come_through(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt")
    module = types.ModuleType("gone")
    module.Thing = type("Thing", (), {"__module__": "gone"})
    sys.modules["gone"] = module
    torch.save(module.Thing(), tmp_path / "gone.pt")
    del sys.modules["gone"]
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'gone'$"):
        load_checkpoint(tmp_path / "gone.pt", weights_only=False)
    torch.save({"a": torch.ones(2)}, tmp_path / "state.pt")
    assert load_checkpoint(tmp_path / "state.pt")["a"].tolist() == [1, 1]
