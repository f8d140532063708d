import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import pytorch_quant
from pytorch_quant import QuantDescriptor, cached_weights
from pytorch_quant import nn as quant_nn
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer


def network():
    model = nn.Sequential(
        quant_nn.QuantConv2d(3, 4, 3),
        nn.ReLU(),
        quant_nn.QuantConv2d(4, 4, 3),
        nn.Flatten(),
        quant_nn.QuantLinear(64, 5),
    )
    pytorch_quant.calibrate(model, [torch.randn(2, 3, 8, 8)], progress=False)
    return model.eval()


@pytest.fixture
def model():
    return network()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def quantized(monkeypatch):
    """The weights that are really quantized, by their shape."""
    seen = []
    process = TensorQuantizer._process

    def counted(self, inputs):
        if isinstance(inputs, nn.Parameter) or (inputs.dim() == 2 and inputs.shape[0] == 12):
            seen.append(tuple(inputs.shape))
        return process(self, inputs)

    monkeypatch.setattr(TensorQuantizer, "_process", counted)
    return seen


def intercepted(model):
    return [m for m in model.modules() if getattr(m, "_handlers", ())]


def fresh(model, x):
    """What the model gives with nothing kept."""
    with torch.no_grad():
        return copy.deepcopy(model)(x)


def test_each_weight_is_quantized_once(model, x, quantized):
    expected = fresh(model, x)
    del quantized[:]
    with torch.no_grad(), cached_weights(model) as entered:
        assert entered is model
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert sorted(quantized) == [(4, 3, 3, 3), (4, 4, 3, 3), (5, 64)]
    with torch.no_grad():
        model(x)
    assert len(quantized) == 6, "something was kept beyond the scope"


@pytest.mark.parametrize(
    "edit",
    [
        lambda w, o: w.data.mul_(1.5),
        lambda w, o: w.data.copy_(torch.randn_like(w)),
        lambda w, o: o.step(),
        lambda w, o: setattr(w, "data", w.data.flip(0)),
    ],
    ids=["data.mul_", "data.copy_", "fused optimizer", "data ="],
)
def test_edits_between_two_scopes_are_seen(model, x, edit):
    weight = model[0].weight
    optimizer = torch.optim.AdamW([weight], lr=0.02, fused=True)
    for _ in range(2):
        with torch.no_grad(), cached_weights(model):
            before = model(x)
            assert torch.equal(before, fresh(model, x))
        weight.grad = torch.randn_like(weight)
        edit(weight, optimizer)
        with torch.no_grad(), cached_weights(model):
            assert torch.equal(model(x), fresh(model, x))
            assert not torch.equal(model(x), before)
        with torch.no_grad():
            assert torch.equal(model(x), fresh(model, x))


def set_amax(model):
    quantizer = model[0].weight_quantizer
    quantizer.amax = quantizer.amax * 0.5


def load(model):
    state = {
        name: t * 0.5 if t.is_floating_point() else t for name, t in model.state_dict().items()
    }
    model.load_state_dict(state)


def load_one_range(model):
    quantizer = model[0].weight_quantizer
    quantizer.load_state_dict({"_amax": quantizer._amax * 0.5})


def replace_weight(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


CHANGES = {
    "amax": set_amax,
    "_amax": lambda m: setattr(m[0].weight_quantizer, "_amax", torch.full((4, 1, 1, 1), 0.1)),
    "load_state_dict": load,
    "load_state_dict of a quantizer": load_one_range,
    "a new parameter": replace_weight,
    "data =": lambda m: setattr(m[0].weight, "data", m[0].weight.data * 2),
    "double": lambda m: m.double(),
    "disable": lambda m: m[0].weight_quantizer.disable(),
    "num_bits": lambda m: setattr(m[0].weight_quantizer, "num_bits", 4),
    "train and data": lambda m: (m.train(), m[0].weight.data.mul_(2), m.eval()),
    "compute_amax": lambda m: pytorch_quant.calibrate(
        m, [torch.randn(2, 3, 8, 8)], "entropy", weight_method="mse", progress=False
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_inside_of_a_scope_drop_what_was_kept(model, x, change):
    with torch.no_grad(), cached_weights(model):
        before = model(x)
        change(model)
        x = x.to(model[0].weight.dtype)
        after = model(x)
        assert torch.equal(after, fresh(model, x))
    assert not torch.equal(after.float(), before)


def test_training_keeps_nothing(model, x, quantized):
    model.train()
    with cached_weights(model):
        for _ in range(2):
            model(x).sum().backward()
            model[0].weight.data.mul_(1.1)
    assert quantized.count((4, 3, 3, 3)) == 2
    assert model[0].weight.grad is not None


def test_weights_get_their_gradients_in_eval_mode(model, x, quantized):
    with cached_weights(model):
        with torch.no_grad():
            model(x)
        model(x).sum().backward()
        first = model[0].weight.grad.clone()
        model.zero_grad()
        model(x).sum().backward()
    assert torch.equal(first, model[0].weight.grad) and first.abs().sum() > 0


def test_frozen_weights_are_kept_and_the_input_gets_its_gradient(model, x, quantized):
    model.requires_grad_(False)
    x.requires_grad_()
    del quantized[:]
    with cached_weights(model):
        # What is kept from inference mode has to serve where autograd records.
        with torch.inference_mode():
            model(x)
        for _ in range(2):
            x.grad = None
            model(x).sum().backward()
    inside, x.grad = x.grad, None
    assert len(quantized) == 3
    model(x).sum().backward()
    assert torch.equal(inside, x.grad)


def test_the_scope_ends_with_an_exception(model, x):
    with pytest.raises(ZeroDivisionError), torch.no_grad(), cached_weights(model):
        model(x)
        raise ZeroDivisionError
    assert not intercepted(model)


def test_entering_fails_as_a_whole(model):
    model[4].weight_quantizer._amax = torch.ones(7, 1)
    with pytest.raises(ValueError, match="does not fit an input"), cached_weights(model):
        pass
    assert not intercepted(model)


def test_nested_scopes(model, x, quantized):
    with torch.no_grad(), cached_weights(model):
        with cached_weights(model):
            model(x)
        model[0].weight.data.mul_(2)
        del quantized[:]
        with cached_weights(model[0]):
            # What the outer scope holds of the other layers stays.
            assert torch.equal(model(x), fresh(model, x))
        model(x)
    assert (4, 3, 3, 3) in quantized
    assert not intercepted(model)


def test_copies_are_in_no_scope(model, x):
    with torch.no_grad(), cached_weights(model):
        expected = model(x)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in copies:
            assert torch.equal(twin(x), expected)
            twin[0].weight.data.mul_(2)
            changed = twin(x)
            assert not torch.equal(changed, expected)
            twin[0].weight.data.mul_(0.5)
            assert torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)


def test_models_that_share_a_layer(x):
    first, second = network(), network()
    second[0] = first[0]
    with torch.no_grad(), cached_weights(first):
        with cached_weights(second):
            a, b = first(x), second(x)
        assert torch.equal(first(x), a)
    assert torch.equal(fresh(first, x), a) and torch.equal(fresh(second, x), b)


def test_one_quantizer_for_two_weights(x):
    model = nn.Sequential(quant_nn.QuantLinear(8, 8), quant_nn.QuantLinear(8, 8)).eval()
    model[1]._weight_quantizer = model[0]._weight_quantizer
    model[0].weight_quantizer.amax = torch.full((8, 1), 0.2)
    x = torch.randn(3, 8)
    expected = fresh(model, x)
    with torch.no_grad(), cached_weights(model):
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell"])
def test_recurrent_layers(kind, quantized):
    gates = {"LSTM": 3, "GRU": 4, "LSTMCell": 3}[kind]
    layer = getattr(quant_nn, kind)(4, gates).eval()
    steps = torch.randn(2, 4) if kind == "LSTMCell" else torch.randn(5, 2, 4)

    def run():
        result = layer(steps)
        return result[0] if isinstance(result, tuple) else result

    with torch.no_grad():
        pytorch_quant.calibrate(layer, [steps], progress=False)
        expected = run()
        del quantized[:]
        with cached_weights(layer):
            assert all(torch.equal(run(), expected) for _ in range(3))
            assert len(quantized) == 1
            first = layer.weight_ih if kind == "LSTMCell" else layer.weight_ih_l0
            first.data.mul_(3)
        assert not torch.equal(run(), expected)


def test_autocast_has_its_own(model, x):
    with torch.no_grad(), cached_weights(model):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                half = model(x)
            whole = model(x)
    with torch.no_grad():
        assert torch.equal(whole, model(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(half, model(x))


def test_swapped_parameters(model, x):
    other = {name: p.detach() * 2 for name, p in model.named_parameters()}
    stack = {name: torch.stack((p, p * 2)).detach() for name, p in model.named_parameters()}

    def call(parameters):
        return torch.func.functional_call(model, parameters, (x,))

    with torch.no_grad():
        expected, doubled = model(x), call(other)
        with cached_weights(model):
            model(x)
            assert torch.equal(call(other), doubled)
            both = torch.vmap(call)(stack)
            assert torch.equal(model(x), expected)
    torch.testing.assert_close(both, torch.stack((expected, doubled)))


def test_threads(model, x):
    expected = fresh(model, x)
    wrong = []

    def work():
        for _ in range(10):
            with torch.no_grad(), cached_weights(model):
                wrong.append(not torch.equal(model(x), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 40 and not any(wrong)
    assert not intercepted(model)


def test_what_is_being_computed_during_a_change_is_not_kept(model, x, monkeypatch):
    quantizer = model[4].weight_quantizer
    process = TensorQuantizer._process

    def change_meanwhile(self, inputs):
        value = process(self, inputs)
        if self is quantizer and inputs is model[4].weight:
            monkeypatch.undo()
            quantizer.amax = quantizer.amax * 0.5
        return value

    with torch.no_grad(), cached_weights(model):
        quantizer._changed()
        monkeypatch.setattr(TensorQuantizer, "_process", change_meanwhile)
        model(x)
        assert torch.equal(model(x), fresh(model, x))


def test_an_uncalibrated_weight_and_a_disabled_one(x):
    model = nn.Sequential(
        quant_nn.QuantConv2d(3, 4, 3, quant_desc_weight=QuantDescriptor(4)),
        quant_nn.QuantConv2d(4, 4, 3),
    ).eval()
    model[1].weight_quantizer.disable()
    expected = fresh(model, x)
    with torch.no_grad(), cached_weights(model):
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)


def test_a_model_without_quantizers():
    with cached_weights(nn.Linear(2, 2)) as model:
        assert model.weight.shape == (2, 2)


def test_compiled_models(model, x):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        with cached_weights(compiled):
            compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(2):
                model[0].weight.data.mul_(1.5)
                expected = fresh(model, x)
                with cached_weights(compiled):
                    torch.testing.assert_close(compiled(x), expected)
                    (kept,) = model[0].weight_quantizer._handlers
                    kept.ready.zero_()
                    assert not torch.allclose(compiled(x), expected), "it was quantized again"
                torch.testing.assert_close(compiled(x), expected)
