"""Recurrent layers, against torch where they are off and NumPy equations where they are on."""

import copy
import inspect
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn import TensorQuantizer, rnn

# torch's own layer says so, once.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

INPUT, HIDDEN, BATCH, STEPS = 4, 5, 3, 6

CELLS = {
    "lstm": (rnn.QuantLSTMCell, nn.LSTMCell, {}),
    "gru": (rnn.QuantGRUCell, nn.GRUCell, {}),
    "rnn_tanh": (rnn.QuantRNNCell, nn.RNNCell, {}),
    "rnn_relu": (rnn.QuantRNNCell, nn.RNNCell, {"nonlinearity": "relu"}),
    "lstm_no_bias": (rnn.QuantLSTMCell, nn.LSTMCell, {"bias": False}),
    "gru_no_bias": (rnn.QuantGRUCell, nn.GRUCell, {"bias": False}),
}
LAYERS = {
    "lstm": (rnn.QuantLSTM, nn.LSTM, {}),
    "lstm_deep": (rnn.QuantLSTM, nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm_proj": (rnn.QuantLSTM, nn.LSTM, {"num_layers": 2, "proj_size": 3, "bidirectional": True}),
    "lstm_proj_no_bias": (rnn.QuantLSTM, nn.LSTM, {"proj_size": 2, "bias": False}),
    "lstm_batch_first": (rnn.QuantLSTM, nn.LSTM, {"batch_first": True, "bias": False}),
    "gru": (rnn.QuantGRU, nn.GRU, {}),
    "gru_deep": (rnn.QuantGRU, nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False}),
    "gru_batch_first": (rnn.QuantGRU, nn.GRU, {"batch_first": True, "bidirectional": True}),
    "rnn": (rnn.QuantRNN, nn.RNN, {"num_layers": 2}),
    "rnn_relu": (rnn.QuantRNN, nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}
QUANTIZED = [rnn.QuantLSTM, rnn.QuantGRU, rnn.QuantRNN]

cell_cases = pytest.mark.parametrize("case", CELLS)
layer_cases = pytest.mark.parametrize("case", LAYERS)


def build(cases, case, **kwargs):
    """The quantized module of a case and the torch module with the same weights."""
    quantized, plain, options = cases[case]
    module = quantized(INPUT, HIDDEN, **options, **kwargs)
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("quant_desc")}
    reference = plain(INPUT, HIDDEN, **options, **kwargs)
    reference.load_state_dict(module.state_dict())
    return module, reference


def quantizers(module):
    return [m for m in module.modules() if isinstance(m, TensorQuantizer)]


def disable(module):
    for quantizer in quantizers(module):
        quantizer.disable()


def calibrate(module, *args):
    for quantizer in quantizers(module):
        quantizer.disable_quant()
        quantizer.enable_calib()
    module(*args)
    for quantizer in quantizers(module):
        quantizer.enable_quant()
        quantizer.disable_calib()
        quantizer.load_calib_amax()


def sample(layer, batched=True):
    """A sequence for a layer."""
    if not batched:
        return torch.randn(STEPS, INPUT)
    return torch.randn(*((BATCH, STEPS) if layer.batch_first else (STEPS, BATCH)), INPUT)


def initial_state(layer, batched=True):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = (BATCH,) if batched else ()
    h = torch.randn(count, *batch, layer.proj_size or HIDDEN) * 0.5
    return (h, torch.randn(count, *batch, HIDDEN)) if isinstance(layer, nn.LSTM) else h


def flat(value):
    """The tensors of nested tuples; a PackedSequence is one."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value if part is not None for t in flat(part)]


def assert_same(actual, expected):
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


def assert_near(actual, expected, atol):
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=atol)


# The reference: the equations of the torch documentation in NumPy


def np_fake_quantize(x, amax):
    scale = np.float32(amax) / np.float32(127)
    return np.clip(np.rint(x / scale), -128, 127) * scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def np_step(kind, x, state, weights, amax):
    """One time step.

    `weights` is a dict with the keys of a cell, `amax` the range of `[x, h]`, or None to take that
    of this call.
    """
    h = state[0]
    if amax is None:
        amax = max(np.abs(x).max(), np.abs(h).max())
    x, h = np_fake_quantize(x, amax), np_fake_quantize(h, amax)
    w_ih, w_hh = weights["weight_ih"], weights["weight_hh"]
    row_amax = np.maximum(np.abs(w_ih).max(1), np.abs(w_hh).max(1))[:, None]
    w_ih, w_hh = np_fake_quantize(w_ih, row_amax), np_fake_quantize(w_hh, row_amax)
    from_x = x @ w_ih.T + weights.get("bias_ih", 0)
    from_h = h @ w_hh.T + weights.get("bias_hh", 0)
    if kind == "LSTM":
        i, f, g, o = np.split(from_x + from_h, 4, axis=1)
        c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        return (h @ weights["weight_hr"].T if "weight_hr" in weights else h), c
    if kind == "GRU":
        (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(from_x, 3, axis=1), np.split(from_h, 3, axis=1)
        z = sigmoid(z_x + z_h)
        n = np.tanh(n_x + sigmoid(r_x + r_h) * n_h)
        return ((1 - z) * n + z * state[0],)
    total = from_x + from_h
    return (np.tanh(total) if kind == "RNN_TANH" else np.maximum(total, 0),)


def np_layer(layer, x, hx, amax):
    """A layer on `(T, N, I)`; `amax` is one range for each layer and direction, or Nones."""
    parameters = {k: v.detach().numpy() for k, v in layer.named_parameters()}
    directions = 2 if layer.bidirectional else 1
    states = [s.numpy() for s in (hx if layer.mode == "LSTM" else (hx,))]
    finals = []
    for depth in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"_l{depth}" + "_reverse" * direction
            weights = {
                k.removesuffix(suffix): v
                for k, v in parameters.items()
                if k.endswith(suffix) and k.count("_") == 2 + direction
            }
            index = depth * directions + direction
            state = tuple(s[index] for s in states)
            results = [None] * len(x)
            for t in reversed(range(len(x))) if direction else range(len(x)):
                state = np_step(layer.mode, x[t], state, weights, amax[index])
                results[t] = state[0]
            outputs.append(np.stack(results))
            finals.append(state)
        x = np.concatenate(outputs, axis=-1)
    return [torch.from_numpy(a).float() for a in (x, *map(np.stack, zip(*finals, strict=True)))]


def mode_of(cell):
    if isinstance(cell, nn.RNNCell):
        return "RNN_TANH" if cell.nonlinearity == "tanh" else "RNN_RELU"
    return "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU"


def cell_state(cell, batched=True):
    shape = (BATCH, HIDDEN) if batched else (HIDDEN,)
    state = tuple(torch.randn(shape) for _ in range(2 if isinstance(cell, nn.LSTMCell) else 1))
    return state if len(state) == 2 else state[0]


# Off


@pytest.mark.parametrize("batched", [True, False])
@cell_cases
def test_disabled_cell_is_torch(case, batched):
    cell, reference = build(CELLS, case)
    disable(cell)
    x = torch.randn((BATCH, INPUT) if batched else (INPUT,))
    assert_same(cell(x), reference(x))
    hx = cell_state(cell, batched)
    assert_same(cell(x, hx), reference(x, hx))


@pytest.mark.parametrize("batched", [True, False])
@layer_cases
def test_disabled_layer_is_torch(case, batched):
    layer, reference = build(LAYERS, case)
    disable(layer)
    x = sample(layer, batched)
    assert_same(layer(x), reference(x))
    hx = initial_state(layer, batched)
    assert_same(layer(x, hx), reference(x, hx))


@layer_cases
def test_disabled_layer_is_torch_on_packed_sequences(case):
    layer, reference = build(LAYERS, case)
    disable(layer)
    packed = pack_sequence([torch.randn(n, INPUT) for n in (2, 5, 3)], enforce_sorted=False)
    hx = initial_state(layer)
    assert_same(layer(packed, hx), reference(packed, hx))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_disabled_layer_drops_out_like_torch(kind):
    layer = kind(INPUT, HIDDEN, num_layers=3, dropout=0.5)
    plain = getattr(nn, kind.__name__.removeprefix("Quant"))
    reference = plain(INPUT, HIDDEN, num_layers=3, dropout=0.5)
    reference.load_state_dict(layer.state_dict())
    disable(layer)
    x = sample(layer)
    torch.manual_seed(1)
    actual = layer(x)
    torch.manual_seed(1)
    assert_same(actual, reference(x))


def test_layer_without_active_modes_is_torch():
    layer, reference = build(LAYERS, "lstm_deep")
    for quantizer in quantizers(layer):
        quantizer.disable_quant()
    x = sample(layer)
    assert_same(layer(x), reference(x))


@pytest.mark.parametrize("position", range(4))
def test_one_active_quantizer_is_enough(position):
    layer, reference = build(LAYERS, "lstm_deep")
    disable(layer)
    layer._weight_quantizers[position].enable()
    x = sample(layer)
    assert not torch.equal(layer(x)[0], reference(x)[0])


def test_disabled_quantizer_still_scales():
    cell, reference = build(CELLS, "lstm")
    disable(cell)
    cell._input_quantizer.pre_quant_scale = 2.0
    x, (h, c) = torch.randn(BATCH, INPUT), cell_state(cell)
    assert_near(cell(x, (h, c)), reference(2 * x, (2 * h, c)), 1e-6)


# On


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@cell_cases
def test_cell_against_numpy(case, batched, calibrated):
    cell, _ = build(CELLS, case)
    x = torch.randn((BATCH, INPUT) if batched else (INPUT,))
    hx = cell_state(cell, batched)
    if calibrated:
        # Another range than that of this call, so that some values saturate.
        calibrate(cell, 0.8 * x, tuple(0.8 * s for s in hx) if isinstance(hx, tuple) else 0.8 * hx)
    amax = cell._input_quantizer.amax if calibrated else None
    weights = {k: v.detach().numpy() for k, v in cell.named_parameters()}
    rows = [s.reshape(-1, s.shape[-1]).numpy() for s in flat(hx)]
    expected = np_step(mode_of(cell), x.reshape(-1, INPUT).numpy(), rows, weights, amax)
    shape = (BATCH, HIDDEN) if batched else (HIDDEN,)
    expected = [torch.from_numpy(e).float().reshape(shape) for e in expected]
    assert_near(cell(x, hx), expected, 1e-6)


@cell_cases
def test_cell_starts_from_zeros(case):
    cell, _ = build(CELLS, case)
    x = torch.randn(BATCH, INPUT)
    zeros = torch.zeros(BATCH, HIDDEN)
    assert_same(cell(x), cell(x, (zeros, zeros) if isinstance(cell, nn.LSTMCell) else zeros))


@pytest.mark.parametrize("calibrated", [True, False])
@layer_cases
def test_layer_against_numpy(case, calibrated):
    layer, _ = build(LAYERS, case)
    x, hx = sample(layer), initial_state(layer)
    if calibrated:
        calibrate(layer, 0.7 * x, hx)
    amax = [q.amax for q in layer._input_quantizers]
    assert (None in amax) != calibrated
    swap = (lambda t: t.transpose(0, 1)) if layer.batch_first else (lambda t: t)
    output, *final = np_layer(layer, swap(x).numpy(), hx, amax)
    assert_near(layer(x, hx), [swap(output), *final], 2e-6)


@layer_cases
def test_unbatched_layer_is_a_batch_of_one(case):
    layer, _ = build(LAYERS, case)
    x, hx = sample(layer, batched=False), initial_state(layer, batched=False)
    axis = 0 if layer.batch_first else 1
    output, final = layer(x, hx)
    one = tuple(s.unsqueeze(1) for s in hx) if isinstance(hx, tuple) else hx.unsqueeze(1)
    expected, expected_final = layer(x.unsqueeze(axis), one)
    assert_same(output, expected.squeeze(axis))
    assert_same(final, [s.squeeze(1) for s in flat(expected_final)])


@layer_cases
def test_layer_starts_from_zeros(case):
    layer, _ = build(LAYERS, case)
    x, hx = sample(layer), initial_state(layer)
    zeros = tuple(0 * s for s in hx) if isinstance(hx, tuple) else 0 * hx
    assert_same(layer(x), layer(x, zeros))


@layer_cases
def test_fine_quantization_trains_like_torch(case):
    fine = QuantDescriptor(16)
    rows = QuantDescriptor(16, axis=0)
    deep = {"dropout": 0.4} if LAYERS[case][2].get("num_layers") else {}
    layer, reference = build(LAYERS, case, quant_desc_input=fine, quant_desc_weight=rows, **deep)
    x, hx = sample(layer).requires_grad_(), initial_state(layer)
    results = []
    for module in (layer, reference):
        torch.manual_seed(1)
        output = module(x, hx)
        loss = sum(
            (t * torch.linspace(-1, 1, t.numel()).reshape(t.shape)).sum() for t in flat(output)
        )
        names = dict(module.named_parameters())
        gradients = torch.autograd.grad(loss, [x, *names.values()])
        assert all(g.abs().max() > 0 for g in gradients)
        results.append((output, gradients))
    (actual, gradients), (expected, expected_gradients) = results
    assert_near(actual, expected, 1e-3)
    assert_near(gradients, expected_gradients, 5e-3)


@cell_cases
def test_cell_gradients_reach_every_parameter(case):
    cell, reference = build(
        CELLS, case, quant_desc_input=QuantDescriptor(16), quant_desc_weight=QuantDescriptor(16)
    )
    x, hx = torch.randn(BATCH, INPUT), cell_state(cell)
    for module in (cell, reference):
        flat(module(x, hx))[0].square().sum().backward()
    for p, r in zip(cell.parameters(), reference.parameters(), strict=True):
        assert r.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, r.grad, rtol=0, atol=1e-3)


def test_bfloat16_layer_keeps_its_dtype():
    layer = rnn.QuantLSTM(INPUT, HIDDEN, bidirectional=True, dtype=torch.bfloat16)
    output, final = layer(sample(layer).bfloat16())
    assert {t.dtype for t in flat((output, final))} == {torch.bfloat16}


# Calibration


@pytest.mark.parametrize("case", ["lstm", "lstm_proj_no_bias", "gru", "rnn"])
def test_calibration_sees_input_and_state_of_every_step(case):
    layer, reference = build(LAYERS, case)
    x, hx = 0.01 * sample(layer), initial_state(layer)
    calibrate(layer, x, hx)
    output = reference(x, hx)[0]
    # The state that leaves the last step enters no other.
    first = max(x.abs().max(), flat(hx)[0][0].abs().max())
    if layer.num_layers == 1:
        first = max(first, output[:-1].abs().max())
        torch.testing.assert_close(layer._input_quantizers[0].amax, first, rtol=1e-5, atol=0)
    else:
        assert layer._input_quantizers[0].amax >= first
        assert layer._input_quantizers[1].amax >= output[:-1].abs().max() - 1e-6


def test_calibration_ranges_layers_and_directions_apart():
    layer, _ = build(LAYERS, "lstm_deep")
    # Inputs so small that the ranges are those of the states.
    calibrate(layer, 0.01 * sample(layer))
    assert len({float(q.amax) for q in layer._input_quantizers}) == 4
    assert [q.amax.shape for q in layer._weight_quantizers] == [(4 * HIDDEN, 1)] * 4


@pytest.mark.parametrize("cases, case", [(CELLS, "gru"), (LAYERS, "lstm_proj"), (LAYERS, "rnn")])
def test_weights_to_quantize_are_what_the_quantizers_see_once(cases, case):
    module, _ = build(cases, case)
    seen = []
    for quantizer in quantizers(module):
        quantizer.register_forward_pre_hook(lambda q, args: seen.append((q, args[0])))
    module(torch.randn(BATCH, INPUT) if cases is CELLS else sample(module))
    listed = module.weights_to_quantize()
    weights = {id(q): w for q, w in listed}
    seen = [(q, x) for q, x in seen if id(q) in weights]
    assert [q for q, _ in seen] == [q for q, _ in listed]
    for quantizer, x in seen:
        assert torch.equal(x, weights[id(quantizer)])


# Packed sequences


@pytest.mark.parametrize("lengths", [(5, 4, 2), (2, 5, 4), (1, 3, 3)])
@layer_cases
def test_packed_sequences_against_each_alone(case, lengths):
    layer, _ = build(LAYERS, case)
    calibrate(layer, sample(layer))
    sequences = [torch.randn(n, INPUT) for n in lengths]
    hx = initial_state(layer)
    is_sorted = list(lengths) == sorted(lengths, reverse=True)
    padded = nn.utils.rnn.pad_sequence(sequences)
    packed = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=is_sorted)
    output, final = layer(packed, hx)
    assert output.data.shape[0] == sum(lengths)
    output, _ = pad_packed_sequence(output)
    for i, x in enumerate(sequences):
        one = tuple(s[:, i] for s in hx) if isinstance(hx, tuple) else hx[:, i]
        expected, expected_final = layer(x, one)
        assert_near(output[: len(x), i], expected, 1e-6)
        assert not output[len(x) :, i].any()
        assert_near([s[:, i] for s in flat(final)], expected_final, 1e-6)


def test_packed_sequences_start_from_zeros():
    layer, _ = build(LAYERS, "lstm_proj")
    packed = pack_sequence([torch.randn(n, INPUT) for n in (2, 5, 3)], enforce_sorted=False)
    zeros = tuple(torch.zeros_like(s) for s in initial_state(layer))
    assert_same(layer(packed), layer(packed, zeros))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_packed_sequences_drop_out_between_layers(kind):
    layer = kind(INPUT, HIDDEN, num_layers=2, dropout=1.0)
    packed = pack_sequence([torch.randn(n, INPUT) for n in (4, 2)])
    other = pack_sequence([torch.randn(n, INPUT) for n in (4, 2)])
    assert_same(layer(packed)[0], layer(other)[0])
    layer.eval()
    assert not torch.equal(layer(packed)[0].data, layer(other)[0].data)


# Modules


@pytest.mark.parametrize("cases, case", [(CELLS, "lstm"), (LAYERS, "lstm_deep"), (LAYERS, "gru")])
def test_state_dict_round_trip(cases, case):
    module, reference = build(cases, case)
    assert list(module.state_dict()) == list(reference.state_dict())
    x = torch.randn(BATCH, INPUT) if cases is CELLS else sample(module)
    calibrate(module, x)
    state = module.state_dict()
    added = {
        f"{name}._amax" for name, m in module.named_modules() if isinstance(m, TensorQuantizer)
    }
    assert set(state) - set(reference.state_dict()) == added
    fresh, _ = build(cases, case)
    fresh.load_state_dict(state)
    assert_same(fresh(x), module(x))


def test_quantizer_names():
    assert {n for n, _ in rnn.QuantGRUCell(2, 3).named_children()} == {
        "_input_quantizer",
        "_weight_quantizer",
    }
    layer = rnn.QuantGRU(2, 3, num_layers=2, bidirectional=True)
    assert len(layer._input_quantizers) == len(layer._weight_quantizers) == 4
    assert layer._weight_quantizers[0].axis == 0
    assert layer._input_quantizers[0].axis is None


def test_float_state_dict_loads():
    layer = rnn.QuantLSTM(INPUT, HIDDEN, num_layers=2)
    calibrate(layer, sample(layer))
    plain = nn.LSTM(INPUT, HIDDEN, num_layers=2)
    result = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith("_amax") for key in result.missing_keys)
    assert torch.equal(layer.weight_hh_l1, plain.weight_hh_l1)


def test_descriptors_reach_every_quantizer():
    layer = rnn.QuantLSTM(
        INPUT,
        HIDDEN,
        bidirectional=True,
        quant_desc_input=QuantDescriptor(6),
        quant_desc_weight=QuantDescriptor(4, axis=0),
    )
    assert [q.num_bits for q in layer._input_quantizers] == [6, 6]
    assert [q.num_bits for q in layer._weight_quantizers] == [4, 4]
    cell = rnn.QuantGRUCell(INPUT, HIDDEN, quant_desc_input=QuantDescriptor(5))
    assert (cell._input_quantizer.num_bits, cell._weight_quantizer.num_bits) == (5, 8)


@pytest.mark.parametrize("cases, case", [(CELLS, "lstm"), (LAYERS, "lstm_deep"), (LAYERS, "gru")])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_apart(cases, case, duplicate):
    module, _ = build(cases, case)
    x = torch.randn(BATCH, INPUT) if cases is CELLS else sample(module)
    calibrate(module, x)
    expected = module(x)
    other = duplicate(module)
    for quantizer in quantizers(module):
        quantizer._amax.mul_(0.5)
    for parameter in module.parameters():
        parameter.data.zero_()
    assert_same(other(x), expected)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_classes_are_the_torch_classes(name):
    quantized = getattr(rnn, f"Quant{name}")
    assert getattr(rnn, name) is quantized
    module = quantized(INPUT, HIDDEN)
    plain = getattr(nn, name)(INPUT, HIDDEN)
    assert isinstance(module, getattr(nn, name))
    for parameter in inspect.signature(quantized.__init__).parameters.values():
        if parameter.name not in ("self", "kwargs"):
            assert getattr(plain, parameter.name) == getattr(module, parameter.name)
    with pytest.raises(TypeError, match="Unused keys: quant_desc_bias"):
        quantized(INPUT, HIDDEN, quant_desc_bias=None)
    placed = quantized(INPUT, HIDDEN, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in placed.parameters())


@pytest.mark.parametrize("count", [{}, {"num_layers": 4}])
def test_quantizers_added_to_a_float_layer(count):
    plain = nn.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True)
    layer = rnn.QuantLSTM.__new__(rnn.QuantLSTM)
    layer.__dict__.update(copy.deepcopy(plain).__dict__)
    layer.init_quantizer(QuantDescriptor(8), QuantDescriptor(8, axis=0), **count)
    expected = rnn.QuantLSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True)
    expected.load_state_dict(plain.state_dict())
    x = sample(plain)
    assert_same(layer(x), expected(x))


@pytest.mark.parametrize(
    "module, shapes, error",
    [
        (rnn.QuantLSTM(4, 5), [(6, 3, 3)], RuntimeError),
        (rnn.QuantLSTM(4, 5), [(4,)], ValueError),
        (rnn.QuantGRU(4, 5), [(6, 3, 4), (1, 2, 5)], RuntimeError),
        (rnn.QuantGRU(4, 5), [(6, 4), (1, 3, 5)], RuntimeError),
    ],
)
def test_layers_refuse_wrong_shapes(module, shapes, error):
    with pytest.raises(
        error, match=r"input must have|2-D or 3-D|must be equal|Expected hidden size"
    ):
        module(*map(torch.zeros, shapes))


@pytest.mark.parametrize(
    "x, hx, wrong",
    [
        ((3, 5), (3, 4), "an input"),
        ((3, 5), None, "an input"),
        ((2, 3, 4), None, "an input"),
        ((3, 4), (1, 5), "a state"),
        ((4,), (1, 5), "a state"),
    ],
)
def test_cells_refuse_wrong_shapes(x, hx, wrong):
    cell = rnn.QuantGRUCell(4, 5)
    with pytest.raises(RuntimeError, match=f"QuantGRUCell: expected {wrong} of shape"):
        cell(torch.zeros(x), hx and torch.zeros(hx))


def test_cell_refuses_a_cell_state_that_would_broadcast():
    with pytest.raises(RuntimeError, match="expected a state of shape"):
        rnn.QuantLSTMCell(4, 5)(torch.zeros(3, 4), (torch.zeros(3, 5), torch.zeros(1, 5)))


# Export


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("case", ["lstm_proj_no_bias", "gru_batch_first", "rnn", "cell"])
def test_onnx_export_equals_torch(case, dynamo, tmp_path):
    module, _ = build(CELLS, "lstm") if case == "cell" else build(LAYERS, case)
    module.eval()
    if case == "cell":
        args = (torch.randn(BATCH, INPUT), cell_state(module))
    else:
        x = sample(module).narrow(1 if module.batch_first else 0, 0, 3)
        args = (x, initial_state(module))
    calibrate(module, *args)
    path = tmp_path / "model.onnx"
    torch.onnx.export(module, args, path, dynamo=dynamo, verbose=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), flat(args), strict=True)}
    actual = [torch.from_numpy(a) for a in session.run(None, feeds)]
    assert_near(actual, module(*args), 1e-5)
