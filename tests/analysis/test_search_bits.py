import copy
import inspect
import itertools
import json

import numpy as np
import onnx
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
from reference import fake_quant
from torch import nn

from pytorch_quant import (
    FP8,
    INT4_WEIGHT_ONLY,
    INT8,
    INT8_DYNAMIC,
    QuantDescriptor,
    Scheme,
    TensorQuantizer,
    calibrate,
    export_onnx,
    quantize,
)
from pytorch_quant.analysis import INT4, search_bits
from pytorch_quant.analysis.bit_problem import BitProblem
from pytorch_quant.analysis.bit_search import choice_names
from pytorch_quant.placement.layers import find_layers
from pytorch_quant.scheme import PRESETS


def search(model, batches, budget, choices=(INT4, INT8, None), **options):
    return search_bits(model, batches, budget, choices, progress=False, **options)


def mlp():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 32))
    return model.eval(), [torch.randn(32, 64) for _ in range(2)]


def test_figures_and_optimum_equal_numpy_and_all_assignments():
    model, batches = mlp()
    x = torch.cat(batches).numpy()
    names = ("0", "2", "3")

    def run(bits_of):
        y = x
        for name in names:
            layer = model[int(name)]
            w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            amax = np.abs(floats[name]).max()
            if bits_of.get(name):
                y = fake_quant(y, amax)
                rows = np.abs(w).max(1, keepdims=True)
                w = fake_quant(w, rows, bits=bits_of[name])
            y = y @ w.T + b
            y = np.maximum(y, 0) if name == "0" else y
        return y

    floats = {}
    handles = [
        model[int(n)].register_forward_pre_hook(
            lambda m, args, n=n: floats.update({n: args[0].numpy()})
        )
        for n in names
    ]
    with torch.no_grad():
        real = model(torch.cat(batches)).numpy()
    for handle in handles:
        handle.remove()
    bits = {"INT4": 4, "INT8": 8, "float": 32}
    errors, sizes, bops = {}, {}, {}
    for name in names:
        weight = model[int(name)].weight
        for choice, b in bits.items():
            quantized = run({name: b} if b < 32 else {})
            errors[name, choice] = ((quantized - real) ** 2).sum() / (real**2).sum()
            scales = 0 if b == 32 else 4 * len(weight)
            sizes[name, choice] = weight.numel() * b / 8 + scales
            bops[name, choice] = 32 * weight.numel() * (32 * 32 if b == 32 else b * 8)
    biases = 4 * (96 + 64 + 32)
    whole = sum(p.numel() * 4 for p in model.parameters())
    for ratio in (0.2, 0.3, 0.6):
        found = search(model, batches, ratio)
        for row in found.layers:
            for choice, error in row.errors.items():
                wanted = errors[row.name, choice]
                assert error == pytest.approx(wanted, rel=1e-3, abs=1e-7)
            assert row.macs == 32 * row.weights and row.kind == "linear"
        table = {row.name: row.errors for row in found.layers}
        best = min(
            (sum(table[n][c] for n, c in zip(names, assignment, strict=True)), assignment)
            for assignment in itertools.product(bits, repeat=3)
            if biases + sum(sizes[n, c] for n, c in zip(names, assignment, strict=True))
            <= ratio * whole
        )
        chosen = found.chosen
        assert tuple(chosen.choices[n] for n in names) == best[1]
        assert chosen.error == pytest.approx(best[0])
        assert chosen.size == biases + sum(sizes[n, chosen.choices[n]] for n in names)
        assert (
            chosen.size_ratio == pytest.approx(chosen.size / whole) and chosen.size_ratio <= ratio
        )
        assert chosen.bops == sum(bops[n, chosen.choices[n]] for n in names)
        assert chosen.bops_ratio == pytest.approx(
            chosen.bops / sum(bops[n, "float"] for n in names)
        )
    same = search(model, batches, {"size": int(0.3 * whole)}).chosen
    assert same == search(model, batches, 0.3).chosen


def test_every_budget_is_kept():
    model, batches = mlp()
    cheap = search(model, batches, {"bops": 0.04}).chosen
    assert cheap.bops_ratio <= 0.04
    both = search(model, batches, {"bops": 0.05, "size": 0.24}).chosen
    assert both.bops_ratio <= 0.05 and both.size_ratio <= 0.24
    small = search(model, batches, {"error": 1e-3})
    fast = search(model, batches, {"error": 1e-3}, minimize="bops")
    assert small.chosen.error <= 1e-3 and fast.chosen.error <= 1e-3
    assert small.chosen.size <= fast.chosen.size and fast.chosen.bops <= small.chosen.bops
    exact = search(model, batches, {"error": 0}).chosen
    assert set(exact.choices.values()) == {"float"} and exact.size_ratio == 1
    for budget, told in (
        (0.05, r"size=0\.05 \(the least possible is [\d,]+ bytes, 0\.1\d+ of the float model\)"),
        ({"bops": 10}, r"bops=10 \(the least possible is [\d,]+, 0\.03"),
        ({"size": 0.2, "error": 1e-9}, "error=1e-09 .*together"),
    ):
        with pytest.raises(ValueError, match=told):
            search(model, batches, budget)


@pytest.mark.parametrize("method", ["sqnr", "fisher"])
def test_rules_give_the_predicted_model_on_digits(method):
    model, training, testing = trained()
    make_hard(model)
    batches = [training[i] for i in range(3)]
    before = state_of(model)
    options = {"method": method, "rules": {"head": None, "block/add#0": INT8}}
    found = search(model, batches, 0.3, (INT4, INT8, FP8, None), **options)
    assert_same_state(before, state_of(model))
    assert "head" not in found.chosen.choices
    # The layer that was made hard on purpose wants the format with an exponent, or none.
    assert found.chosen.choices["expand"] in ("FP8", "float")
    assert found.rules["head"] is None and found.rules["expand"] in (FP8, None)
    quantized = calibrated(model, batches, found.rules)
    for row in found.layers:
        layer = quantized.get_submodule(row.name)
        scheme = found.rules[row.name]
        if scheme is None:
            assert not hasattr(layer, "_weight_quantizer")
        else:
            assert layer._weight_quantizer.num_bits == scheme.weight.num_bits
            assert layer._input_quantizer.num_bits == scheme.input.num_bits
    assert accuracy(model, testing) - accuracy(quantized, testing) < 3
    assert found.front[0].size >= found.front[-1].size
    plain = json.loads(found.to_json())
    assert plain["rules"]["head"] is None and plain["method"] == method
    assert "chosen" in str(found) and "INT4" in str(found)


DEFAULT_CHOICES = inspect.signature(search_bits).parameters["choices"].default


def descriptors(model):
    return {
        name: (q.num_bits, q.axis, q.unsigned, q.dynamic, q.fake_quant)
        for name, q in model.named_modules()
        if isinstance(q, TensorQuantizer)
    }


@pytest.mark.parametrize(
    "choices",
    [DEFAULT_CHOICES, *((choice,) for choice in DEFAULT_CHOICES), tuple(PRESETS.values())],
    ids=lambda choices: "-".join(choice_names(choices)),
)
def test_quantize_takes_the_rules_in_every_form(choices):
    model, batches = mlp()
    placement = "onnxruntime"
    # With a choice, the budget has to make use of it.
    budget = 0.25 if len(choices) > 1 else 1.0
    found = search(model, batches, budget, choices, placement=placement)
    forms = (found.rules, found.as_dict()["rules"], json.loads(found.to_json())["rules"])
    made = [
        descriptors(
            quantize(copy.deepcopy(model), rules, example_inputs=batches[0], placement=placement)
        )
        for rules in forms
    ]
    assert made[0] == made[1] == made[2]
    for row in found.layers:
        scheme = None if row.choice == "float" else PRESETS[row.choice]
        for operand in ("input", "weight"):
            wanted = getattr(scheme, operand, None)
            got = made[0].get(f"{row.name}._{operand}_quantizer")
            if wanted is not None:
                assert got is not None and got[0] == wanted.num_bits
                assert got[3] == wanted.dynamic
                channels = operand == "weight" and scheme.per_channel
                assert got[1] == (0 if channels else wanted.axis)
            elif scheme is None:
                assert got is None


def test_a_choice_does_not_take_the_name_of_a_preset():
    model, batches = mlp()
    coarse = Scheme("INT8", QuantDescriptor(8), QuantDescriptor(3))
    with pytest.raises(ValueError, match="the preset INT8; give it a name of its own"):
        search(model, batches, 1.0, (coarse, None))


def test_a_layer_takes_only_what_fits_it():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(512, 64), nn.Linear(64, 24))
    batches = [(torch.randn(4, 16, 6, 6), torch.zeros(4))]
    found = search(model, batches, 1.0, ("INT4_WEIGHT_ONLY", "INT8", INT8_DYNAMIC))
    by_name = {row.name: set(row.errors) for row in found.layers}
    assert by_name == {
        "0": {"INT8"},
        "2": {"INT4_WEIGHT_ONLY", "INT8"},
        "3": {"INT4_WEIGHT_ONLY", "INT8"},
    }
    # Blocks of 64: one float32 scale each; activations stay float.
    least = search(model, batches, {"bops": 1.0}, (INT4_WEIGHT_ONLY, INT8)).front[-1]
    assert set(least.choices.values()) == {"INT8"}
    only = search(model, batches, 0.2, (INT4_WEIGHT_ONLY, INT8)).chosen
    assert only.choices["2"] == "INT4_WEIGHT_ONLY"
    weights = {"0": 32 * 16 * 9 + 4 * 32, "2": 512 * 64 // 2 + 4 * 512, "3": 0}
    weights["3"] = {"INT8": 64 * 24 + 4 * 24, "INT4_WEIGHT_ONLY": 32 * 24 + 4 * 24}[
        only.choices["3"]
    ]
    assert only.size == sum(weights.values()) + 4 * (32 + 64 + 24)
    with pytest.raises(ValueError, match=r"no choice fits 0: .*blocks"):
        search(model, batches, 1.0, ("INT4_WEIGHT_ONLY",))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.up = nn.ConvTranspose2d(8, 4, 2)

    def forward(self, x, scale=1.0, *, shift):
        y = self.second(self.first(self.first(x)) * scale) + shift
        return {"y": y, "z": self.up(y.reshape(-1, 8, 8, 8))}


def test_batches_of_every_form_and_counts_of_operations():
    model = Keywords().eval()
    batch = {"x": torch.randn(8, 64), "shift": torch.ones(64)}
    found = search(model, [batch], 1.0, placement="none")
    macs = {row.name: row.macs for row in found.layers}
    # The first layer runs twice; a transposed convolution multiplies each input value.
    assert macs == {"first": 2 * 8 * 64 * 64, "second": 8 * 64 * 64, "up": 512 * 4 * 2 * 2}
    pair = [(torch.randn(8, 64), "a label")]
    again = search(
        model, pair, 1.0, placement="none", forward=lambda m, b: m(b[0], 1.0, shift=torch.ones(64))
    )
    assert {row.name: row.macs for row in again.layers} == macs


def test_wrong_use_is_refused():
    model, batches = mlp()
    with pytest.raises(TypeError, match="empty after one pass"):
        search(model, iter(batches), 0.5)
    with pytest.raises(ValueError, match="no batches"):
        search(model, [], 0.5)
    with pytest.raises(ValueError, match="unknown budget 'sise'; did you mean 'size'"):
        search(model, batches, {"sise": 0.5})
    with pytest.raises(TypeError, match="budget 'size' must be a number, got 'small'"):
        search(model, batches, "small")
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            search(model, batches, value)
    assert search(model, batches, np.float32(0.5)).chosen == search(model, batches, 0.5).chosen
    with pytest.raises(TypeError, match="search_bits takes a module, got str"):
        search("model.pt", batches, 0.5)
    with pytest.raises(ValueError, match="points=0 is out of range"):
        search(model, batches, 0.5, points=0)
    with pytest.raises(TypeError, match=r"points must be a whole number, got 2\.5"):
        search(model, batches, 0.5, points=2.5)
    with pytest.raises(ValueError, match="budget is empty"):
        search(model, batches, {})
    with pytest.raises(ValueError, match="unknown choice 'int9'; did you mean 'INT"):
        search(model, batches, 0.5, ("int9",))
    with pytest.raises(TypeError, match="sequence of Schemes"):
        search(model, batches, 0.5, INT8)
    with pytest.raises(ValueError, match="unknown method 'fishr'; did you mean 'fisher'"):
        search(model, batches, 0.5, method="fishr")
    with pytest.raises(ValueError, match="needs labels"):
        search(model, batches, 0.5, method="fisher")
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        search(model, batches, 0.5, rules={"*": None})
    quantized = quantize(copy.deepcopy(model), example_inputs=batches[0])
    calibrate(quantized, batches, progress=False)
    with pytest.raises(ValueError, match="starts from a float model"):
        search(quantized, batches, 0.5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(128, 64)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 128, bias=False)
        self.second.weight = self.first.weight
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.second(torch.relu(self.first(self.words(ids)))))


def test_sizes_of_shared_weights_are_those_of_the_file(tmp_path):
    model, batches = Tied().eval(), [torch.randint(0, 128, (4, 8))]
    found = search(model, batches, 1.0, (INT8, None), placement="none")
    assert found.chosen.size == sum(p.numel() * 4 for p in model.parameters())
    assert found.chosen.size_ratio == 1 and found.chosen.error == 0
    for point in found.front:
        # The embedding stays, so that codes of the head would come on top.
        assert point.choices["head"] == "float"
        assert point.choices["first"] == point.choices["second"]
        rules = {"": INT8} | {n: None for n, c in point.choices.items() if c == "float"}
        if "INT8" not in point.choices.values():
            continue
        made = quantize(copy.deepcopy(model), rules, example_inputs=batches[0], placement="none")
        calibrate(made, batches, progress=False)
        export_onnx(made, batches[0], tmp_path / "model.onnx")
        arrays = map(
            onnx.numpy_helper.to_array, onnx.load(tmp_path / "model.onnx").graph.initializer
        )
        codes = [array for array in arrays if array.dtype == np.int8 and array.ndim == 2]
        # Stored once for both layers.
        assert [array.size for array in codes] == [64 * 64]
        assert point.size == 4 * (128 * 64 + 64) + 64 * 64 + 4 * 64
    faster = search(model, batches, {"bops": 0.1}, (INT8, None), placement="none").chosen
    assert faster.choices["head"] == "INT8"
    weights = 64 * 64 + 4 * 64 + 64 * 128 + 4 * 128
    assert faster.size == 4 * (128 * 64 + 64) + weights
    layers = find_layers(dict(model.named_modules()))
    layers = {name: layers[name] for name in ("first", "second")}
    errors = {"first": {0: 0.1}, "second": {1: 0.1}}
    problem = BitProblem(model, layers, dict.fromkeys(layers, 1), errors, [INT8, FP8])
    with pytest.raises(ValueError, match="first, second share a weight, and no choice fits"):
        problem.solve({"size": 1.0}, "sqnr", "size", 3, {})


def test_loaders_that_draw_and_inference_mode():
    model, batches = mlp()
    data = torch.utils.data.TensorDataset(torch.cat(batches), torch.randint(0, 32, (64,)))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    before = torch.random.get_rng_state()
    found = search(model, loader, 0.3, method="fisher")
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.inference_mode():
        again = search(model, loader, 0.3, method="fisher")
    assert again.chosen == found.chosen
