import pytest
import torch
from torch import nn

from pytorch_quant import nn as quant_nn
from pytorch_quant import quant_modules


@pytest.fixture(autouse=True)
def _patches_do_not_leak():
    before = {name: getattr(nn, name) for name in ("Conv2d", "Linear", "Softmax", "LSTM")}
    yield
    while quant_modules._active:
        quant_modules.deactivate()
    assert {name: getattr(nn, name) for name in before} == before


def test_initialize_and_deactivate():
    original = nn.Conv2d
    quant_modules.initialize()
    assert nn.Conv2d is quant_nn.QuantConv2d and nn.LSTM is quant_nn.QuantLSTM
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))
    quant_modules.deactivate()
    assert nn.Conv2d is original
    assert [type(m) for m in model] == [quant_nn.QuantConv2d, quant_nn.QuantLinear]


def test_every_default_replacement_builds_from_the_same_arguments():
    arguments = {"Linear": (4, 4), "LSTM": (4, 4), "LSTMCell": (4, 4)}
    for entry in quant_modules._DEFAULT_QUANT_MAP:
        given = arguments.get(entry.mod_name, (4,) if "Pool" in entry.mod_name else (4, 4, 3))
        float_layer = entry.orig_mod.__dict__[entry.mod_name](*given)
        assert isinstance(entry.replace_mod(*given), type(float_layer))


def test_with_form_restores_after_an_exception():
    original = nn.Linear
    with pytest.raises(ZeroDivisionError), quant_modules.initialize():
        assert nn.Linear is quant_nn.QuantLinear
        raise ZeroDivisionError
    assert nn.Linear is original


def test_with_form_under_its_other_name():
    with quant_modules.quantized_modules(float_module_list=["Linear"]):
        assert nn.Linear is not quant_nn.QuantLinear and nn.Conv2d is quant_nn.QuantConv2d


def test_leaving_a_with_block_takes_later_patches_along():
    original = nn.Conv2d
    with quant_modules.initialize():
        quant_modules.initialize()
    assert nn.Conv2d is original and not quant_modules._active


def test_repeated_and_nested_calls():
    original = nn.Conv2d
    quant_modules.initialize()
    quant_modules.initialize(float_module_list=["Conv2d"])
    assert nn.Conv2d is original and nn.Linear is quant_nn.QuantLinear
    quant_modules.initialize()
    assert nn.Conv2d is quant_nn.QuantConv2d
    quant_modules.deactivate()
    assert nn.Conv2d is original
    quant_modules.deactivate()
    assert nn.Conv2d is quant_nn.QuantConv2d
    quant_modules.deactivate()
    assert nn.Conv2d is original


def test_deactivate_without_initialize_does_nothing():
    original = nn.Conv2d
    quant_modules.deactivate()
    assert nn.Conv2d is original


class QuantSoftmax(nn.Softmax):
    pass


def test_custom_modules():
    original = nn.Softmax
    with quant_modules.initialize(custom_quant_modules=[(torch.nn, "Softmax", QuantSoftmax)]):
        assert nn.Softmax is QuantSoftmax
    assert nn.Softmax is original


def test_entries_appended_to_the_map():
    entry = quant_modules._quant_entry(torch.nn, "Softmax", QuantSoftmax)
    quant_modules._DEFAULT_QUANT_MAP.append(entry)
    try:
        with quant_modules.initialize():
            assert nn.Softmax is QuantSoftmax
    finally:
        quant_modules._DEFAULT_QUANT_MAP.remove(entry)


def test_an_unknown_name_lists_the_valid_ones():
    original = nn.Conv2d
    with pytest.raises(ValueError, match=r"'Conv2D'; did you mean 'Conv2d'\? Valid: Conv1d"):
        quant_modules.initialize(float_module_list=["Conv2D"])
    assert nn.Conv2d is original


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"float_module_list": "Conv2d"}, TypeError, "list of names"),
        ({"custom_quant_modules": [QuantSoftmax]}, TypeError, "a custom quant module is"),
        ({"custom_quant_modules": [(nn, "Softmax", 3)]}, TypeError, "a custom quant module is"),
        ({"custom_quant_modules": [(nn, "Sofmax", QuantSoftmax)]}, AttributeError, "no layer"),
    ],
)
def test_bad_arguments(keywords, error, message):
    with pytest.raises(error, match=message):
        quant_modules.initialize(**keywords)
    assert not quant_modules._active


def test_quant_map_holds_what_is_replaced():
    assert quant_modules.quant_map == set()
    with quant_modules.initialize(float_module_list=["Linear"]):
        names = {entry.mod_name for entry in quant_modules.quant_map}
        assert "Conv2d" in names and "Linear" not in names
    assert quant_modules.quant_map == set()
