"""`with quantizer.intercepted(handler)`."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from pytorch_quant import QuantDescriptor, TensorQuantizer
from pytorch_quant import nn as quant_nn


@pytest.fixture
def quantizer():
    made = TensorQuantizer(QuantDescriptor())
    made.amax = 1.0
    return made


@pytest.fixture
def x():
    return torch.randn(5)


def add(number):
    return lambda x, proceed: proceed(x) + number


def test_a_handler_takes_the_place_of_the_quantizer(quantizer, x):
    y = quantizer(x)
    seen = []

    def handler(given, proceed):
        seen.append(given)
        assert torch.equal(proceed(given), y)
        return given * 2

    with quantizer.intercepted(handler):
        assert torch.equal(quantizer(x), x * 2)
    assert seen[0] is x and torch.equal(quantizer(x), y)
    assert "_handlers" not in vars(quantizer)


def test_handlers_stack(quantizer, x):
    y = quantizer(x)
    double = lambda x, proceed: proceed(x) * 2  # noqa: E731
    with quantizer.intercepted(add(1)):
        with quantizer.intercepted(double), quantizer.intercepted(double):
            assert torch.equal(quantizer(x), (y + 1) * 4)
        assert torch.equal(quantizer(x), y + 1)
    assert torch.equal(quantizer(x), y)


def test_scopes_that_end_in_another_order(quantizer, x):
    y = quantizer(x)
    first, second = quantizer.intercepted(add(1)), quantizer.intercepted(add(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(quantizer(x), y + 2)
    second.__exit__(None, None, None)
    assert torch.equal(quantizer(x), y)


def test_an_error_ends_the_scope(quantizer, x):
    def fail(x, proceed):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), quantizer.intercepted(fail):
        quantizer(x)
    quantizer(x)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_is_in_no_scope(copied, quantizer, x):
    y = quantizer(x)
    # A local function could not be pickled.
    with quantizer.intercepted(lambda x, proceed: x):
        twin = copied(quantizer)
        assert torch.equal(twin(x), y)
        with twin.intercepted(add(1)):
            assert torch.equal(quantizer(x), x)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: setattr(q, "amax", 2.0),
        lambda q: q.set_range(torch.tensor(2.0)),
        lambda q: q.disable(),
        lambda q: q.load_state_dict({"_amax": torch.tensor(2.0)}),
        lambda q: q.double(),
        lambda q: q.train(False),
        lambda q: q.intercepted(add(1)).__enter__(),
    ],
    ids=["amax", "set_range", "disable", "load_state_dict", "double", "train", "another handler"],
)
def test_a_handler_learns_of_changes(change, quantizer):
    class Handler:
        told = 0

        def __call__(self, x, proceed):
            return proceed(x)

        def quantizer_changed(self):
            self.told += 1

    handler = Handler()
    with quantizer.intercepted(handler):
        before = handler.told
        change(quantizer)
        assert handler.told > before


def test_threads(quantizer, x):
    def work():
        for _ in range(200):
            with quantizer.intercepted(lambda x, proceed: proceed(x)):
                quantizer(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "_handlers" not in vars(quantizer)


def test_compiled(x):
    model = quant_nn.QuantLinear(5, 3).eval()
    model.input_quantizer.amax, model.weight_quantizer.amax = 1.0, torch.ones(3, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(x)
        for _ in range(2):
            with model.input_quantizer.intercepted(_halved):
                torch.testing.assert_close(compiled(x), model(x))
                assert not torch.equal(compiled(x), plain)
            with torch.compiler.set_stance("fail_on_recompile"):
                assert torch.equal(compiled(x), plain)


def _halved(x, proceed):
    return proceed(x) * 0.5


def test_a_recurrent_layer_with_idle_quantizers_stays_one(monkeypatch):
    layer = quant_nn.QuantLSTM(3, 3).eval()
    for quantizer in (*layer._input_quantizers, *layer._weight_quantizers):
        quantizer.disable()
    calls = []
    quantizer = layer._input_quantizers[0]
    with quantizer.intercepted(lambda x, proceed: calls.append(x) or proceed(x)):
        expected, _ = layer(torch.ones(2, 1, 3))
    plain = nn.LSTM(3, 3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain(torch.ones(2, 1, 3))[0], expected) and not calls
