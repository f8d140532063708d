from __future__ import annotations

import importlib
import logging

import numpy as np
import pytest
import torch

from pytorch_quant import QuantDescriptor, utils
from pytorch_quant import nn as quant_nn
from pytorch_quant.nn import conv, functional, modules
from pytorch_quant.nn.modules import _utils
from pytorch_quant.utils import quant_logging, reduce_amax

NAMES = {
    "_utils": ["QuantMixin", "QuantInputMixin", "pop_quant_desc_in_kwargs", "TensorQuantizer"],
    "tensor_quantizer": ["TensorQuantizer"],
    "quant_conv": [
        f"{q}Conv{t}{n}d" for q in ("", "Quant") for t in ("", "Transpose") for n in (1, 2, 3)
    ],
    "quant_linear": ["Linear", "QuantLinear"],
    "quant_pooling": [
        f"{q}{kind}Pool{n}d"
        for q in ("", "Quant")
        for kind in ("Max", "Avg", "AdaptiveAvg")
        for n in (1, 2, 3)
    ],
    "quant_instancenorm": [f"{q}InstanceNorm{n}d" for q in ("", "Quant") for n in (1, 2, 3)],
    "quant_rnn": [
        f"{q}{kind}"
        for q in ("", "Quant")
        for kind in ("LSTM", "LSTMCell", "GRU", "GRUCell", "RNN", "RNNCell")
    ],
    "clip": ["Clip"],
}
# What these modules hold besides, and where it is defined.
BESIDES = {
    "_utils": {"QuantDescriptor": QuantDescriptor},
    "tensor_quantizer": {"QuantDescriptor": QuantDescriptor},
    "quant_conv": {
        "_QuantConvNd": conv._QuantConvMixin,
        "_QuantConvTransposeNd": conv._QuantConvTransposeMixin,
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_are_the_same_objects(name):
    module = importlib.import_module(f"pytorch_quant.nn.modules.{name}")
    assert getattr(modules, name) is module
    besides = BESIDES.get(name, {})
    assert sorted(module.__all__) == sorted([*NAMES[name], *besides])
    for entry in NAMES[name]:
        assert getattr(module, entry) is getattr(quant_nn, entry)
    for entry, value in besides.items():
        assert getattr(module, entry) is value


def test_a_custom_module_through_the_old_path():
    class QuantScale(torch.nn.Module, _utils.QuantInputMixin):
        def __init__(self, **kwargs):
            super().__init__()
            self.init_quantizer(
                _utils.pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
            )

        def forward(self, x):
            return self._input_quantizer(x) * 2

    assert isinstance(QuantScale()._input_quantizer, quant_nn.TensorQuantizer)
    with pytest.raises(TypeError, match="Unused keys"):
        QuantScale(quant_desc_wait=1)


AXES = [0, 1, -1, (0,), (1, 2), [0, 2], {1, 2}, (-1, 0), (0, 1, 2), (-3, -2, -1), np.int64(1)]


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_reduce_amax_names_the_axes_to_reduce(axis, keepdims):
    x = torch.randn(2, 3, 4, requires_grad=True)
    numpy_axis = axis if np.ndim(axis) == 0 and not isinstance(axis, set) else tuple(axis)
    expected = np.abs(x.detach().numpy()).max(numpy_axis, keepdims=keepdims)
    amax = reduce_amax(x, axis=axis, keepdims=keepdims)
    assert tuple(amax.shape) == expected.shape
    np.testing.assert_array_equal(amax.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_reduce_amax_of_everything(dtype):
    x = torch.tensor([[1.0, -5.0], [3.0, 2.0]], dtype=dtype)
    for keepdims in (True, False):
        amax = reduce_amax(x, None, keepdims)
        assert amax.shape == ()
        assert amax.dtype == dtype
        assert float(amax) == 5
    assert utils.reduce_amax(x).tolist() == 5
    assert reduce_amax(x, ()).tolist() == [[1, 5], [3, 2]]
    assert reduce_amax(x[:0], 0).tolist() == [[0, 0]]


def test_reduce_amax_bad_axes():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        reduce_amax(x, 2)
    with pytest.raises(ValueError, match="twice"):
        reduce_amax(x, (0, -2))
    with pytest.raises(TypeError, match="axis must be"):
        reduce_amax(x, "0")


@pytest.fixture
def logger():
    logger = logging.getLogger("pytorch_quant")
    level = logger.level
    yield logger
    logger.setLevel(level)


def test_quant_logging_speaks_to_the_standard_library(logger, caplog):
    assert utils.quant_logging is quant_logging
    quant_logging.set_verbosity(quant_logging.DEBUG)
    levels = ["debug", "info", "warning", "warn", "error", "critical", "fatal"]
    for level in levels:
        getattr(quant_logging, level)("%s from %s", level, "here")
    quant_logging.log(logging.INFO, "by number")
    expected = [*(f"{level} from here" for level in levels), "by number"]
    assert [record.getMessage() for record in caplog.records] == expected
    assert {record.name for record in caplog.records} == {"pytorch_quant"}
    assert {record.filename for record in caplog.records} == {"test_old_modules.py"}
    assert not logger.handlers


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (logging.ERROR, logging.ERROR),
        ("info", logging.INFO),
        ("WARNING", logging.WARNING),
        (-2, logging.ERROR),
        (-1, logging.WARNING),
        (0, logging.INFO),
        (1, logging.DEBUG),
    ],
)
def test_verbosity(logger, caplog, level, expected):
    quant_logging.set_verbosity(level)
    assert quant_logging.get_verbosity() == logger.level == expected
    quant_logging.log(expected - 1, "hidden")
    quant_logging.log(expected, "shown")
    assert [record.getMessage() for record in caplog.records] == ["shown"]
    with pytest.raises(ValueError, match="LOUD"):
        quant_logging.set_verbosity("loud")


def test_every_public_name_resolves():
    for path in ("optim", "optim.helper", "utils", "utils.quant_logging", "nn.modules", "calib"):
        module = importlib.import_module(f"pytorch_quant.{path}")
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name)
    assert functional.clip is quant_nn.functional.clip
