"""`import pytorch_quantization` resolves to this package."""

import copy
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch

import pytorch_quant
from pytorch_quant.compat import alias

EVERYTHING = """
import sys
sys.modules["absl"] = None
import pytorch_quant
pytorch_quant.install_as_pytorch_quantization()
pytorch_quant.install_as_pytorch_quantization()
import pytorch_quantization
from pytorch_quantization import nn as quant_nn, quant_modules, calib, tensor_quant, utils, optim
import pytorch_quantization.nn.modules.tensor_quantizer
import pytorch_quantization.nn.functional
from pytorch_quantization.nn.modules import _utils, quant_conv, quant_linear, quant_pooling
from pytorch_quantization.nn.modules import quant_instancenorm, quant_rnn, clip, tensor_quantizer
from pytorch_quantization.nn.modules.tensor_quantizer import TensorQuantizer
from pytorch_quantization.nn.modules.quant_conv import QuantConv2d, QuantConvTranspose2d
from pytorch_quantization.nn.modules._utils import QuantMixin, QuantInputMixin
from pytorch_quantization.nn.modules._utils import pop_quant_desc_in_kwargs
from pytorch_quantization.nn.functional import clip as clip_function
from pytorch_quantization.tensor_quant import QuantDescriptor, ScaledQuantDescriptor
from pytorch_quantization.calib.max import MaxCalibrator
from pytorch_quantization.calib.histogram import HistogramCalibrator, calibrate_weights
from pytorch_quantization.calib.histogram import _compute_amax_entropy, _compute_amax_mse
from pytorch_quantization.calib.histogram import _compute_amax_percentile
from pytorch_quantization.calib.calibrator import _Calibrator
from pytorch_quantization.optim import helper
from pytorch_quantization.optim.helper import match_parameters, group_parameters
from pytorch_quantization.optim.helper import freeze_parameters, quant_weight_inplace
from pytorch_quantization.utils.reduce_amax import reduce_amax
from pytorch_quantization.utils import quant_logging
from pytorch_quantization.quant_modules import _DEFAULT_QUANT_MAP, _quant_entry, initialize
from pytorch_quantization import enable_onnx_export
assert quant_nn.TensorQuantizer is TensorQuantizer is pytorch_quant.TensorQuantizer
assert pytorch_quantization.nn.modules.quant_conv.QuantConv2d is pytorch_quant.nn.QuantConv2d
assert issubclass(MaxCalibrator, _Calibrator) and calib.MaxCalibrator is MaxCalibrator
assert "absl" not in [name.partition(".")[0] for name, m in sys.modules.items() if m]
print("fine")
"""


@pytest.mark.slow
def test_every_import_of_programs(python):
    code, out, err = python("-W", "error", "-c", EVERYTHING)
    assert (code, out) == (0, "fine\n"), err


@pytest.mark.parametrize("path", alias.TARGETS)
def test_every_path(not_installed, path):
    alias.install_as_pytorch_quantization()
    spec = importlib.util.find_spec(path)
    module = importlib.import_module(path)
    assert module is sys.modules[path]
    assert module.__name__ == spec.name == path
    assert module.__file__ == spec.origin
    assert isinstance(module, types.ModuleType)


def test_attributes_without_imports_of_their_own(old):
    package = old.package
    assert package.nn.modules.quant_linear.QuantLinear is pytorch_quant.nn.QuantLinear
    assert package.calib.histogram.HistogramCalibrator is pytorch_quant.calib.HistogramCalibrator
    assert package.optim.helper.group_parameters
    assert "QuantConv2d" in dir(package.nn) and "modules" in dir(package.nn)
    assert {"nn", "calib", "enable_onnx_export"} <= set(dir(package))
    # The alias adds to this package nothing of its own.
    assert pytorch_quant.calib.histogram.Histogram
    assert not hasattr(package, "export_onnx") and not hasattr(package, "np")


def test_star_import(old):
    names = {}
    exec("from pytorch_quantization.nn import *", names)
    assert names["QuantConv2d"] is pytorch_quant.nn.QuantConv2d
    exec("from pytorch_quantization.tensor_quant import *", names)
    assert names["QuantDescriptor"] is pytorch_quant.QuantDescriptor


def test_setting_reaches_this_package(old):
    old.package.nn.TensorQuantizer.use_fb_fake_quant = True
    assert pytorch_quant.TensorQuantizer.use_fb_fake_quant
    kept = copy.copy(pytorch_quant.quant_modules._DEFAULT_QUANT_MAP)
    old.quant_modules._DEFAULT_QUANT_MAP = kept
    assert pytorch_quant.quant_modules._DEFAULT_QUANT_MAP is kept
    old.nn.QuantOwn = torch.nn.Identity
    assert pytorch_quant.nn.QuantOwn is torch.nn.Identity
    del old.nn.QuantOwn
    assert not hasattr(pytorch_quant.nn, "QuantOwn")


def test_patching_reaches_this_package_and_comes_back(old):
    kept = pytorch_quant.calib.MaxCalibrator
    with mock.patch.object(old.calib, "MaxCalibrator", None):
        assert pytorch_quant.calib.MaxCalibrator is None
    assert pytorch_quant.calib.MaxCalibrator is kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(old.calib, "MaxCalibrator", None)
        assert pytorch_quant.calib.MaxCalibrator is None
    assert pytorch_quant.calib.MaxCalibrator is kept


@pytest.mark.parametrize("path", alias.TARGETS)
def test_vars_agree_with_attributes(old, path):
    module = importlib.import_module(path)
    for name, value in vars(module).items():
        if not (name.startswith("__") and name.endswith("__")):
            assert getattr(module, name) is value, name
    assert set(dir(module)) <= set(vars(module))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_functions_compile(old):
    def run(x):
        return old.nn.functional.clip(x, -0.5, 0.5) + old.package.utils.reduce_amax(x)

    x = torch.randn(5)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x.clamp(-0.5, 0.5) + x.abs().max())


def test_versions_and_detection(old):
    version = old.package.__version__
    assert version.startswith("2.2.")
    assert importlib.import_module("pytorch_quantization.version").__version__ == version
    for name in ("pytorch_quantization", "pytorch-quantization", "PyTorch.Quantization"):
        assert importlib.metadata.version(name) == version
    assert importlib.util.find_spec("pytorch_quantization") is not None
    assert "pytorch-quantization" in importlib.metadata.packages_distributions().get(
        "pytorch_quantization"
    )
    assert importlib.util.find_spec("pytorch_quantization.nonsense") is None
    assert importlib.metadata.version("numpy") == np.__version__
    importlib.metadata.entry_points()


def test_without_the_alias_nothing_answers(not_installed):
    assert importlib.util.find_spec("pytorch_quantization") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("pytorch-quantization")


def test_installing_twice_is_harmless(old):
    before = sys.modules["pytorch_quantization"], list(sys.meta_path)
    alias.install_as_pytorch_quantization()
    assert before == (sys.modules["pytorch_quantization"], sys.meta_path)


def test_the_real_package_in_the_process(not_installed, monkeypatch):
    real = types.ModuleType("pytorch_quantization")
    real.__file__ = "/site/pytorch_quantization/__init__.py"
    monkeypatch.setitem(sys.modules, "pytorch_quantization", real)
    with pytest.raises(RuntimeError, match="imported already, from /site/pytorch_quantization"):
        alias.install_as_pytorch_quantization()
    assert importlib.import_module("pytorch_quantization") is real
    assert not any(isinstance(finder, alias._Finder) for finder in sys.meta_path)


def test_a_real_package_that_is_only_installed(not_installed, monkeypatch, tmp_path):
    (tmp_path / "pytorch_quantization").mkdir()
    (tmp_path / "pytorch_quantization" / "__init__.py").write_text("real = True")
    (tmp_path / "pytorch_quantization" / "extra.py").write_text("")
    info = tmp_path / "pytorch_quantization-2.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: pytorch-quantization\nVersion: 2.1.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.metadata.version("pytorch-quantization") == "2.1.2"
    alias.install_as_pytorch_quantization()
    assert not hasattr(importlib.import_module("pytorch_quantization"), "real")
    assert importlib.metadata.version("pytorch-quantization").startswith("2.2.")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("pytorch_quantization.extra")


def test_an_import_that_was_forbidden(not_installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_quantization", None)
    alias.install_as_pytorch_quantization()
    assert importlib.import_module("pytorch_quantization").nn


def test_missing_attributes(old):
    for module, name in ((old.package, "nonsense"), (old.nn, "QuantConv2D"), (old.calib, "__x__")):
        assert not hasattr(module, name)
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(module, name)
    with pytest.raises(AttributeError, match="QuantConv2d"):
        old.nn.QuantConv2D  # noqa: B018


MISSING_NAMES = {
    "from pytorch_quantization import nonsense": "enable_onnx_export",
    "from pytorch_quantization import quant_module": "quant_modules",
    "from pytorch_quantization.nn import QuantConv2D": "QuantConv2d",
    "from pytorch_quantization.tensor_quant import QuantDescripter": "QuantDescriptor",
    "from pytorch_quantization.quant_modules import _DEFAULT_MAP": "_DEFAULT_QUANT_MAP",
    "from pytorch_quantization.calib.histogram import _compute_amax_mean": "_compute_amax_mse",
}


@pytest.mark.parametrize("many", ["", "".join(f"x{i} = a{i}\n" for i in range(300))])
@pytest.mark.parametrize("line", MISSING_NAMES)
def test_missing_names(old, line, many):
    # With more than 255 names before it, the statement is compiled in a longer form.
    names = {f"a{i}": i for i in range(300)}
    with pytest.raises(ImportError, match=f"cannot import name.*{MISSING_NAMES[line]}") as caught:
        exec(many + line, names)
    assert not isinstance(caught.value, ModuleNotFoundError)
    assert caught.value.name == line.split()[1]


MISSING_MODULES = {
    "pytorch_quantization.nonsense": "there are: calib, nn, optim",
    "pytorch_quantization.quant_module": "near names: quant_modules",
    "pytorch_quantization.nn.modules.quant_convs": "near names: quant_conv",
    "pytorch_quantization.tensor_quant.deeper": "is not a package",
}


@pytest.mark.parametrize("path", MISSING_MODULES)
def test_missing_modules(old, path):
    with pytest.raises(ModuleNotFoundError, match=MISSING_MODULES[path]) as caught:
        importlib.import_module(path)
    assert caught.value.name == path
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        exec(f"import {path}", {})
    if "deeper" not in path:
        assert importlib.util.find_spec(path) is None


def test_reduce_amax_is_module_and_function(old):
    from pytorch_quantization import utils as quant_utils
    from pytorch_quantization.utils.reduce_amax import reduce_amax

    x = torch.randn(3, 4, 5)
    # Here the axis is the one that is reduced.
    wanted = np.abs(x.numpy()).max(1, keepdims=True)
    np.testing.assert_array_equal(reduce_amax(x, axis=1, keepdims=True), wanted)
    np.testing.assert_array_equal(quant_utils.reduce_amax(x, axis=1, keepdims=True), wanted)

    np.testing.assert_array_equal(old.package.utils.reduce_amax(x, axis=1), wanted)
    assert isinstance(sys.modules["pytorch_quantization.utils.reduce_amax"], types.ModuleType)


def test_enable_onnx_export(old):
    with old.package.enable_onnx_export():
        pass
    with pytest.raises(KeyError), old.package.enable_onnx_export():
        raise KeyError
    assert pytorch_quant.enable_onnx_export is old.package.enable_onnx_export
