import copy
import json
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from analysis_models import assert_same_state, calibrated, state_of, trained
from reference import fake_quant
from torch import nn

from pytorch_quant import calibrate, fold_batchnorm, quantize
from pytorch_quant.analysis import compare_models


def test_figures_equal_numpy_and_weights_are_those_of_the_quantizers():
    model, training, _ = trained()
    quantized = calibrated(model, [training[0], training[1]])
    states = state_of(model), state_of(quantized)
    found = compare_models(model, quantized, training[0])
    assert_same_state(states[0], state_of(model))
    assert_same_state(states[1], state_of(quantized))
    rows = {row.name: row for row in found.tensors}
    assert list(rows) == [
        "stem",
        "block.first",
        "block.second",
        "block",
        "squeeze",
        "expand",
        "head",
        "",
    ]
    with torch.no_grad():
        a = model(training[0][0]).double().numpy().ravel()
        b = quantized(training[0][0]).double().numpy().ravel()
    row = rows[""]
    assert row.kind == "Digits" and row.shape == (64, 10)
    assert row.sqnr_db == pytest.approx(10 * np.log10((a @ a) / ((b - a) @ (b - a))), abs=1e-3)
    assert row.max_difference == pytest.approx(np.abs(b - a).max(), rel=1e-5)
    assert row.cosine == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-9)
    weights = {row.name: row for row in found.weights}
    w = model.squeeze.weight.detach().numpy().reshape(16, -1)
    error = fake_quant(w, np.abs(w).max(1, keepdims=True)) - w
    row = weights["squeeze.weight"]
    assert row.format == "int8"
    assert row.max_difference == pytest.approx(np.abs(error).max(), rel=1e-4)
    assert row.sqnr_db == pytest.approx(10 * np.log10((w**2).sum() / (error**2).sum()), abs=1e-3)
    assert "squeeze.bias" not in weights
    assert not found.only_in_a and not found.only_in_b


def test_the_first_difference_is_where_something_was_changed():
    model, training, _ = trained()
    other = copy.deepcopy(model)
    assert compare_models(model, other, training[0]).first_divergence is None
    with torch.no_grad():
        other.block.second.bias[3] += 1
    found = compare_models(model, other, training[0])
    assert found.first_divergence.name == "block.second"
    assert found.first_divergence.max_difference == pytest.approx(1, abs=1e-5)
    assert [row.name for row in found.weights] == ["block.second.bias"]
    assert found.weights[0].format == "float"
    assert "first difference: block.second" in str(found)
    assert json.loads(found.to_json())["tensors"][0]["sqnr_db"] is None


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Odd(nn.Module):
    """Outputs of all kinds, a module that runs twice, one that writes in place."""

    def __init__(self, wide=False, extra=False):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.wide = nn.Linear(4, 6 if wide else 5)
        self.lstm = nn.LSTM(4, 3)
        self.nan = nn.Threshold(-1e9, float("nan"))
        self.drop = nn.Dropout(0.9)
        if extra:
            self.extra = nn.Identity()

    def forward(self, x):
        y = self.drop(self.lin(self.relu(self.lin(x))))
        if hasattr(self, "extra"):
            y = self.extra(y)
        return {"pair": Pair(y, self.wide(y)), "ids": y.argmax(1), "rnn": self.lstm(y)}


def test_outputs_of_all_kinds_and_modules_of_one_model_alone():
    a, b = Odd(), Odd(wide=True, extra=True)
    state = a.state_dict()
    b.load_state_dict({k: v for k, v in state.items() if "wide" not in k}, strict=False)
    a.train()
    found = compare_models(a, b, torch.randn(5, 4))
    assert a.training and a.drop.training
    labels = [row.label for row in found.tensors]
    assert labels == [
        "lin",
        "relu",
        "lin (call 1)",
        "drop",
        "wide",
        "lstm[0]",
        "lstm[1][0]",
        "lstm[1][1]",
        "(model)['pair'][0]",
        "(model)['pair'][1]",
        "(model)['rnn'][0]",
        "(model)['rnn'][1][0]",
        "(model)['rnn'][1][1]",
    ]
    rows = dict(zip(labels, found.tensors, strict=True))
    # What the in-place ReLU made of it later does not show.
    assert rows["lin"].max_difference == 0 and rows["lin"].cosine == 1
    assert rows["wide"].note == "shape (5, 6)"
    assert found.first_divergence.label == "wide"
    assert found.only_in_b == ["extra"] and found.only_in_a == []
    assert {row.name: row.note for row in found.weights} == {
        "wide.weight": "shape (6, 4)",
        "wide.bias": "shape (6,)",
    }
    assert "only in the second model: extra" in str(found)


def test_folded_batch_norm_and_nan():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()).eval()
    x = torch.randn(2, 16, 8, 8)
    folded = quantize(copy.deepcopy(model), example_inputs=x)
    calibrate(folded, [x], progress=False)
    fold_batchnorm(folded)
    found = compare_models(model, folded, x)
    assert found.tensors[-1].sqnr_db > 30 and found.tensors[-1].cosine > 0.999
    assert {"0.weight"} <= {row.name for row in found.weights}
    broken = copy.deepcopy(model)
    broken[0].weight.data[0, 0, 0, 0] = float("nan")
    found = compare_models(model, broken, x)
    assert found.first_divergence.name == "0"
    assert found.tensors[0].sqnr_db == -float("inf") and np.isnan(found.tensors[0].max_difference)
    json.loads(found.to_json())


def test_wrong_use_is_refused():
    with pytest.raises(TypeError, match="takes two modules, got str"):
        compare_models(nn.Linear(2, 2), "model.pt", torch.randn(1, 2))

    class Silent(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    with pytest.raises(ValueError, match="no module of the same name"):
        compare_models(Silent(), Silent(), torch.randn(1, 2))

    class Fails(nn.Sequential):
        def forward(self, x):
            raise KeyError("mine")

    model, x = Fails(nn.Linear(2, 2)), torch.randn(1, 2)
    before = state_of(model)
    with pytest.raises(KeyError, match="mine"):
        compare_models(model, model, x)
    assert_same_state(before, state_of(model))


def test_weights_of_recurrent_layers_and_of_calls():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(16, 24, 2, bidirectional=True)
            self.cell = nn.GRUCell(48, 32)
            self.w = nn.Parameter(torch.randn(64, 32))

        def forward(self, x):
            return nn.functional.linear(self.cell(self.lstm(x)[0][-1]), self.w)

    model, x = Model().eval(), torch.randn(5, 3, 16)
    quantized = quantize(copy.deepcopy(model), {"": "INT8"}, example_inputs=x)
    calibrate(quantized, [x], progress=False)
    before = state_of(quantized)
    rows = {row.name: row for row in compare_models(model, quantized, x).weights}
    assert_same_state(before, state_of(quantized))
    weights = {n: p for n, p in model.named_parameters() if "bias" not in n}
    assert rows.keys() == weights.keys() and len(rows) == 8 + 2 + 1

    def expected(*parts):
        # One amax for each row of [W_ih, W_hh].
        whole = np.concatenate(parts, 1)
        return fake_quant(whole, np.abs(whole).max(1, keepdims=True))

    arrays = {name: weight.detach().numpy() for name, weight in weights.items()}
    pairs = [(f"lstm.weight_{{}}_l{i}{d}") for i in (0, 1) for d in ("", "_reverse")]
    for pattern in (*pairs, "cell.weight_{}"):
        names = [pattern.format(kind) for kind in ("ih", "hh")]
        after = expected(*(arrays[name] for name in names))
        width = arrays[names[0]].shape[1]
        for name, part in zip(names, (after[:, :width], after[:, width:]), strict=True):
            error = part - arrays[name]
            wanted = 10 * np.log10((arrays[name] ** 2).sum() / (error**2).sum())
            assert rows[name].format == "int8"
            assert rows[name].sqnr_db == pytest.approx(wanted, abs=1e-3)
            assert rows[name].max_difference == pytest.approx(np.abs(error).max(), rel=1e-4)
    error = expected(arrays["w"]) - arrays["w"]
    assert rows["w"].max_difference == pytest.approx(np.abs(error).max(), rel=1e-4)


def test_what_is_not_finite_in_the_first_model_does_not_count():
    class Masked(nn.Module):
        def __init__(self, factor, mask=-math.inf):
            super().__init__()
            self.factor, self.mask = factor, mask

        def forward(self, x):
            return (x * self.factor).masked_fill(torch.eye(4).bool(), self.mask)

    x = torch.randn(4, 4)
    row = compare_models(Masked(1.0), Masked(0.9), x).tensors[0]
    assert row.sqnr_db == pytest.approx(20, abs=1e-4) and row.cosine == pytest.approx(1)
    # Nothing that could be compared is not the same as no difference.
    row = compare_models(Masked(math.nan), Masked(1.0), x).tensors[0]
    assert math.isnan(row.sqnr_db) and math.isnan(row.cosine)
    found = compare_models(nn.ReLU(), nn.ReLU(), x[:0])
    assert math.isnan(found.tensors[0].sqnr_db) and found.first_divergence is None
    assert str(found).splitlines()[1].split()[-3:] == ["-", "0", "-"]
