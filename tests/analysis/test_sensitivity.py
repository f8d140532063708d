import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from analysis_models import (
    accuracy,
    assert_same_state,
    calibrated,
    make_hard,
    state_of,
    trained,
)
from torch import nn
from torch.nn import functional as F

from pytorch_quant import QuantDescriptor, Scheme, TensorQuantizer, calibrate, quantize
from pytorch_quant.analysis import layer_errors, sensitivity, summary
from pytorch_quant.nn import QuantConv2d, QuantLinear

METHODS = ("sqnr", "loss", "fisher", "evaluate")


def rank(model, batches, method, **options):
    return sensitivity(model, batches, method=method, progress=False, **options)


@pytest.mark.parametrize("method", METHODS)
def test_finds_the_hard_layer_and_without_it_accuracy_is_back(method):
    model, training, testing = trained()
    make_hard(model)
    batches = [training[i] for i in range(3)]
    rules = {"": "INT8"}
    real = accuracy(model, testing)
    quantized = calibrated(model, batches, rules)
    assert real - accuracy(quantized, testing) > 20
    before = state_of(quantized)
    evaluate = (lambda m: accuracy(m, testing)) if method == "evaluate" else None
    ranking = rank(quantized, batches, method, evaluate=evaluate)
    assert_same_state(before, state_of(quantized))
    assert ranking.rows[0].name == "expand" and ranking.rows[0].rank == 1
    assert ranking.exclude(1) == {"expand": None}
    again = calibrated(model, batches, {**rules, **ranking.exclude(1)})
    assert not hasattr(again.expand, "_input_quantizer")
    assert real - accuracy(again, testing) <= 1


def test_max_drop_holds_on_the_batches_when_measured_again():
    model, training, testing = trained()
    make_hard(model)
    batches = [training[i] for i in range(2)]
    quantized = calibrated(model, batches)

    def loss_of(m):
        with torch.no_grad():
            losses = [F.cross_entropy(m(x), y, reduction="sum") for x, y in batches]
        return float(sum(losses)) / sum(len(y) for _, y in batches)

    ranking = rank(quantized, batches, "loss")
    assert ranking.reference == pytest.approx(loss_of(model), abs=1e-5)
    assert ranking.total == pytest.approx(loss_of(quantized) - loss_of(model), abs=1e-4)
    assert ranking.exclude(max_drop=ranking.total + 1) == {}
    for max_drop in (0.02, 0.0):
        excluded = ranking.exclude(max_drop=max_drop, progress=False)
        fresh = calibrated(model, batches, excluded)
        assert loss_of(fresh) - loss_of(model) <= max_drop + 1e-6
        assert list(excluded) == [row.name for row in ranking.rows[: len(excluded)]]
    # A ranking by another method, the promise kept with a score.
    calls = []

    def evaluate(m):
        calls.append(m)
        return accuracy(m, testing)

    cheap = rank(quantized, batches, "sqnr", evaluate=evaluate)
    assert not calls
    excluded = cheap.exclude(max_drop=1.0, progress=False)
    assert calls and all(m is quantized for m in calls)
    assert accuracy(model, testing) - accuracy(calibrated(model, batches, excluded), testing) <= 1
    full = rank(quantized, None, "evaluate", evaluate=evaluate)
    assert full.exclude(max_drop=1.0, progress=False).keys() == {"expand"}


def small():
    model = nn.Sequential(
        QuantLinear(6, 8, quant_desc_input=QuantDescriptor(4)), nn.ReLU(), QuantLinear(8, 3)
    )
    images = [torch.randn(5, 6) for _ in range(2)]
    with torch.no_grad():
        w, b = model[2].weight, model[2].bias
        hidden = [F.relu(F.linear(x, model[0].weight, model[0].bias)) for x in images]
        batches = [(x, F.linear(h, w, b).argmax(1)) for x, h in zip(images, hidden, strict=True)]
    calibrate(model, batches, progress=False)
    return model, batches


def test_fisher_equals_numpy_on_the_formula():
    model, batches = small()
    with torch.no_grad():
        expected = dict.fromkeys("02", 0.0)
        for x, y in batches:
            w = [model[i].weight.double().numpy() for i in (0, 2)]
            b = [model[i].bias.double().numpy() for i in (0, 2)]
            x = x.double().numpy()
            hidden = x @ w[0].T + b[0]
            active = np.maximum(hidden, 0)
            logits = active @ w[1].T + b[1]
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            # The gradient of the cross entropy of each sample.
            g1 = p - np.eye(3)[y.numpy()]
            g0 = (g1 @ w[1]) * (hidden > 0)
            for index, inputs, real, g in ((0, x, hidden, g0), (2, active, logits, g1)):
                error = model[index](torch.tensor(inputs).float()).double().numpy() - real
                expected[str(index)] += 0.5 * ((g * error) ** 2).sum()
    ranking = rank(model, batches, "fisher")
    scores = {row.name: row.score for row in ranking.rows}
    assert scores == pytest.approx({k: v / 10 for k, v in expected.items()}, rel=1e-3)


def test_fisher_of_calls_needs_one_backward_pass_and_leaves_gradients():
    model, training, _ = trained()
    batches = [training[0], training[1]]
    quantized = calibrated(model, batches)
    runs = []

    def forward(m, batch):
        runs.append(1)
        return m(batch[0])

    quantized.stem.weight.grad = torch.ones_like(quantized.stem.weight)
    quantized.squeeze.requires_grad_(False)
    before = state_of(quantized)
    ranking = rank(quantized, iter(batches), "fisher", forward=forward)
    assert len(runs) == 2
    assert_same_state(before, state_of(quantized))
    scores = {row.name: row.score for row in ranking.rows}
    assert "block/add#0" in scores and min(scores.values()) > 0
    # The add alone, by hand: the gradient that the identity has from the add.
    total = 0.0
    for x, y in batches:
        z = torch.relu(model.stem(x))
        identity = z.detach().requires_grad_()
        out = torch.relu(model.block.second(torch.relu(model.block.first(z))) + identity)
        out = torch.relu(model.expand(torch.relu(model.squeeze(out))))
        loss = F.cross_entropy(model.head(out.mean((2, 3))), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, identity)
        e = quantized.block.first._input_quantizer(z).detach() - z.detach()
        total += 0.5 * float((g * e).double().square().sum())
    assert scores["block/add#0"] == pytest.approx(total / 128, rel=1e-3)
    assert scores.keys() == {row.name for row in rank(quantized, batches, "sqnr").rows}


class InPlace(nn.Module):
    """Writes to what its layers return; one layer runs twice and has two names."""

    def __init__(self):
        super().__init__()
        self.conv = QuantConv2d(3, 3, 1)
        self.again = self.conv
        self.relu = nn.ReLU(inplace=True)
        self.hand = TensorQuantizer(QuantDescriptor(4))
        self.head = QuantLinear(3, 2)

    def forward(self, x):
        x = self.relu(self.conv(x))
        x = self.relu(self.again(x).add_(1))
        return self.head(self.hand(x).mean((2, 3)))


@pytest.mark.parametrize("method", ["sqnr", "fisher", "loss"])
def test_in_place_layers_shared_layers_and_quantizers_by_hand(method):
    model = InPlace()
    batches = [(torch.randn(4, 3, 5, 5), torch.randint(0, 2, (4,)))]
    calibrate(model, batches, progress=False)
    before = state_of(model)
    ranking = rank(model, batches, method)
    assert_same_state(before, state_of(model))
    rows = {row.name: row for row in ranking.rows}
    assert rows.keys() == {"conv", "hand", "head"}
    assert rows["hand"].kind == "quantizer" and rows["hand"].quantizers == ("hand",)
    assert rows["head"].quantizers == ("head._input_quantizer", "head._weight_quantizer")
    model.relu.inplace = False
    for row in rank(model, batches, method).rows:
        assert rows[row.name].score == pytest.approx(row.score, rel=1e-5, abs=0)


def test_a_model_that_is_one_layer_and_calls_of_the_model_itself():
    layer = quantize(nn.Linear(64, 64), {"": "INT8"}, example_inputs=torch.randn(3, 64))
    batches = [torch.randn(3, 64)]
    calibrate(layer, batches, progress=False)
    assert rank(layer, batches, "sqnr").exclude(1) == {"": None}
    assert "(model)" in str(rank(layer, batches, "sqnr"))

    class Product(nn.Module):
        def forward(self, a, b):
            return torch.matmul(a, b)

    pair = (torch.randn(64, 64), torch.randn(64, 64))
    product = quantize(Product(), example_inputs=pair)
    calibrate(product, [pair], progress=False)
    rules = rank(product, [pair], "sqnr").exclude(1)
    assert rules == {"/matmul#0": None}
    left = quantize(Product(), rules, example_inputs=pair)
    assert not list(left.modules())[1:]


def test_recurrent_layers_and_attention():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(64, 64, batch_first=True)
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            y = self.lstm(x)[0]
            return self.attention(y, y, y)[0].mean(1)

    model, x = Sequence().eval(), torch.randn(4, 5, 64)
    batches = [(x, torch.randint(0, 64, (4,)))]
    coarse = Scheme("COARSE", QuantDescriptor(8), QuantDescriptor(3))
    rules = {"lstm": coarse}
    quantized = quantize(copy.deepcopy(model), rules, example_inputs=x)
    calibrate(quantized, batches, progress=False)
    errors = layer_errors(quantized, batches, progress=False)
    alone = copy.deepcopy(quantized)
    for name, module in alone.named_modules():
        if isinstance(module, TensorQuantizer) and not name.startswith("lstm"):
            module.disable()
    with torch.no_grad():
        real, found = model(x).double(), alone(x).double()
        wanted = 10 * torch.log10(real.square().sum() / (found - real).square().sum())
    assert errors.layers[0].name == "lstm"
    assert errors.layers[0].only_db == pytest.approx(float(wanted), abs=0.01)
    # What three bits leave.
    assert 0.05 < errors.layers[0].weight_error < 0.5
    for method in ("sqnr", "fisher", "loss"):
        before = state_of(quantized)
        ranking = rank(quantized, batches, method)
        assert_same_state(before, state_of(quantized))
        assert ranking.rows[0].name == "lstm" or method == "loss"
        again = quantize(copy.deepcopy(model), rules | ranking.exclude(2), example_inputs=x)
        left = {row.name for row in ranking.rows[:2]}
        assert not left & {row.layer for row in summary(again).rows if row.state != "float"}


def test_predicted_drop_is_the_sum_of_the_rows():
    model, batches = small()
    ranking = rank(model, batches, "fisher")
    first, second = ranking.rows
    assert ranking.exclude(max_drop=(first.score + second.score) * 1.001) == {}
    assert ranking.exclude(max_drop=second.score * 1.001) == {first.name: None}
    assert len(ranking.exclude(max_drop=0)) == 2
    ranking = rank(model, batches, "sqnr")
    noise = [10 ** (-row.score / 10) for row in ranking.rows]
    assert noise[0] >= noise[1]
    assert ranking.exclude(max_drop=noise[1] * 1.001) == {ranking.rows[0].name: None}


def test_loss_of_ones_own_and_batches_that_are_no_pairs():
    model, batches = small()
    mappings = [{"input": x, "label": y} for x, y in batches]

    def forward(m, batch):
        return {"logits": m(batch["input"])}

    def loss(output, batch):
        return F.cross_entropy(output["logits"], batch["label"])

    for method in ("loss", "fisher"):
        plain = rank(model, batches, method)
        mapped = rank(model, mappings, method, forward=forward, loss=loss)
        assert [row.name for row in plain.rows] == [row.name for row in mapped.rows]
        assert plain.rows[0].score == pytest.approx(mapped.rows[0].score)
        with pytest.raises(ValueError, match="needs labels"):
            rank(model, mappings, method, forward=forward)
        with pytest.raises(ValueError, match=r"cross entropy of logits \(N, C\)"):
            rank(model, [(x, torch.randn(5, 6, 1)) for x, _ in batches], method)
        with pytest.raises(ValueError, match=r"tensor of one value, got \(5, 3\)"):
            rank(model, batches, method, loss=lambda output, target: output)
    with pytest.raises(ValueError, match="the loss has no gradient"):
        rank(model, batches, "fisher", loss=lambda o, t: F.cross_entropy(o.detach(), t))


def test_iterators_serve_but_not_a_second_time():
    model, batches = small()
    # Nothing of the input is left.
    model[0]._input_quantizer.amax = 1e-3
    ranking = rank(model, iter(batches), "loss")
    assert ranking.total > 0.1
    assert ranking.rows == rank(model, batches, "loss").rows
    assert len(ranking.exclude(2)) == 2
    with pytest.raises(TypeError, match=r"empty by now.*exclude\(k\)"):
        ranking.exclude(max_drop=ranking.total / 2)


def test_what_comes_out_can_be_shown_stored_and_read():
    model, batches = small()
    ranking = rank(model, batches, "loss")
    text = str(ranking)
    assert "increase of the loss" in text and "in float" in text and "Linear" in text
    assert json.loads(ranking.to_json())["rows"][0]["rank"] == 1
    loaded = pickle.loads(pickle.dumps(ranking))
    assert loaded == ranking and loaded.exclude(1) == ranking.exclude(1)
    with pytest.raises(RuntimeError, match="loaded from a file"):
        loaded.exclude(max_drop=0.1)
    assert copy.copy(ranking).rows == ranking.rows


def test_wrong_use_is_refused():
    model, batches = small()
    before = state_of(model)
    with pytest.raises(ValueError, match="unknown method 'fischer'; did you mean 'fisher'"):
        rank(model, batches, "fischer")
    with pytest.raises(ValueError, match="needs evaluate="):
        rank(model, batches, "evaluate")
    with pytest.raises(TypeError, match=r"evaluate must be a function, got 0\.9"):
        rank(model, batches, None, evaluate=0.9)
    with pytest.raises(TypeError, match="loss must be a function"):
        rank(model, batches, "loss", loss="mse")
    with pytest.raises(TypeError, match="must return one number"):
        rank(model, None, None, evaluate=lambda m: None)
    with pytest.raises(ValueError, match="NaN with nothing quantized"):
        rank(model, None, None, evaluate=lambda m: math.nan)
    with pytest.raises(TypeError, match="one tensor of shape"):
        rank(model, batches[0][0], "sqnr")
    with pytest.raises(TypeError, match="batches is None"):
        rank(model, None, "sqnr")
    for method in ("sqnr", "loss", "fisher"):
        with pytest.raises(ValueError, match="no batches"):
            rank(model, [], method)
    with pytest.raises(ValueError, match="evaluate returned inf with nothing quantized"):
        rank(model, None, None, evaluate=lambda m: math.inf)
    with pytest.raises(TypeError, match="sensitivity takes a module, got NoneType"):
        rank(None, batches, "sqnr")
    ranking = rank(model, batches, "sqnr")
    for arguments in ({}, {"k": 1, "max_drop": 0.1}):
        with pytest.raises(TypeError, match="either"):
            ranking.exclude(**arguments)
    with pytest.raises(TypeError, match="whole number"):
        ranking.exclude(1.5)
    with pytest.raises(ValueError, match="the ranking has 2 rows"):
        ranking.exclude(3)
    with pytest.raises(ValueError, match="max_drop=-1 is out of range"):
        ranking.exclude(max_drop=-1)
    model[2]._input_quantizer.amax = None
    with pytest.raises(RuntimeError, match=r"1 uncalibrated .*2\._input_quantizer"):
        rank(model, batches, "fisher")
    calibrate(model, batches, progress=False)
    assert_same_state(before, state_of(model))


def test_evaluate_may_train_and_draw():
    model, _ = small()
    before = state_of(model)
    drawn = []

    def evaluate(m):
        m.train()
        drawn.append(float(torch.rand(())))
        return torch.tensor(1.0)

    ranking = rank(model, None, None, evaluate=evaluate)
    assert len(set(drawn)) == 1 and ranking.method == "evaluate"
    assert_same_state(before, state_of(model))
