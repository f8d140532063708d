"""Ranges as parameters: what they start from, where they are kept, what an export writes."""

import copy
import io
import pickle

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx_runs import run as run_file
from qat_models import images, labels, network, ranges, train
from torch import nn
from torch.nn.functional import cross_entropy

from pytorch_quant import (
    QuantDescriptor,
    TensorQuantizer,
    calibrate,
    compute_amax,
    export_onnx,
    fold_batchnorm,
    qat,
)
from pytorch_quant import nn as quant_nn
from pytorch_quant.nn.modes import named_quantizers


def trained(method="lsq"):
    model = network()
    qat.learn_ranges(model, method)
    optimizer = torch.optim.SGD(qat.parameter_groups(model, lr=1e-2))
    train(model, optimizer)
    return model.eval()


def assert_same_ranges(got, wanted):
    assert got.keys() == wanted.keys()
    for name, amax in got.items():
        assert torch.equal(amax, wanted[name]), name


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_learning_starts_without_a_change_and_then_moves_every_range(method):
    model = network().eval()
    before, held = model(images()), ranges(model)
    names = qat.learn_ranges(model, method)
    assert torch.equal(model(images()), before) and set(names) == set(held)
    assert_same_ranges(ranges(model), held)
    assert set(qat.range_parameters(model)) == {f"{name}._amax" for name in held}
    losses = train(model, torch.optim.Adam(model.parameters(), lr=1e-2), steps=8)
    assert losses[-1] < losses[0]
    # With ranges of maxima PACT clips nothing of some tensors at first.
    moved = [name for name, amax in ranges(model).items() if not torch.equal(amax, held[name])]
    assert len(moved) == len(held) if method == "lsq" else moved


def test_only_weights_or_only_activations():
    for kind, options in {"weight": {"activations": False}, "input": {"weights": False}}.items():
        model = network()
        names = qat.learn_ranges(model, **options)
        assert len(names) == 3 and all(kind in name for name in names)


def test_what_does_not_learn_stays_as_it_is():
    model = network()
    model[0]._input_quantizer.disable()
    model[3]._input_quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
    model[5]._input_quantizer = TensorQuantizer(QuantDescriptor(learn_amax=True))
    names = qat.learn_ranges(model, weights=True)
    assert names == [f"{i}._weight_quantizer" for i in (0, 3, 5)]
    # The clip of the former package is a range all the same.
    assert "5._input_quantizer.clip.clip_value_max" in qat.range_parameters(model)


def test_a_second_call_changes_the_method_and_keeps_the_parameters():
    model = trained()
    held = qat.range_parameters(model)
    qat.learn_ranges(model, "pact")
    assert {id(p) for p in held.values()} == {id(p) for p in qat.range_parameters(model).values()}
    assert model[0]._input_quantizer._range_method == "pact"


def test_a_channel_of_zeros_starts_as_the_largest_of_its_tensor():
    model = network(calibrated=False)
    with torch.no_grad():
        model[0].weight[1] = 0
    calibrate(model, [images()], progress=False)
    amax = model[0]._weight_quantizer.amax.flatten()
    assert amax[1] == 0
    qat.learn_ranges(model)
    assert model[0]._weight_quantizer.amax.flatten()[1] == amax.max()


def test_without_ranges_it_names_the_quantizers_and_changes_nothing():
    model = network()
    model[3]._input_quantizer.amax = None
    model[5]._weight_quantizer._amax = torch.full((3, 1), float("nan"))
    told = r"2 quantizer\(s\).*: 3._input_quantizer, 5._weight_quantizer; call calibrate"
    with pytest.raises(RuntimeError, match=told):
        qat.learn_ranges(model)
    assert not qat.range_parameters(model)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: qat.learn_ranges(m, "lsqq"), "unknown method 'lsqq'; use one of lsq, pact"),
        (lambda m: qat.learn_ranges(m, activations=False, weights=False), "both false"),
        (lambda m: qat.learn_ranges(nn.Linear(2, 2)), "no quantizer whose range could train"),
    ],
)
def test_wrong_use(call, told):
    with pytest.raises(ValueError, match=told):
        call(network())


def test_learned_ranges_become_ordinary_ones():
    model = trained()
    y, held = model(images()), ranges(model)
    assert fold_batchnorm(copy.deepcopy(model), images()).skipped
    assert qat.stop_learning(model) is model and not qat.range_parameters(model)
    assert_same_ranges(ranges(model), held)
    assert torch.equal(model(images()), y)
    assert {k: v.shape for k, v in model.state_dict().items()}["0._input_quantizer._amax"] == ()
    assert len(fold_batchnorm(model, images()).pairs) == 1
    torch.testing.assert_close(model(images()), y, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", [quant_nn.QuantLSTM, quant_nn.QuantGRU])
def test_recurrent_layers_learn(kind):
    layer = kind(4, 4, batch_first=True)
    x = torch.randn(3, 5, 4)
    calibrate(layer, [x], progress=False)
    before = layer(x)[0]
    names = qat.learn_ranges(layer)
    y = layer(x)[0]
    assert torch.equal(y, before)
    y.square().sum().backward()
    grads = [p.grad for p in qat.range_parameters(layer).values()]
    assert len(grads) == len(names) and all(g is not None and g.any() for g in grads)


# Keeping


def test_the_checkpoint_loads_with_and_without_learning():
    model = trained()
    plain = network(calibrated=False)
    keys = {**network().state_dict()}
    state = model.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in keys.items()}
    plain.load_state_dict(state)
    assert torch.equal(plain.eval()(images()), model(images()))
    assert not qat.range_parameters(plain)
    # Back into a model that learns, from either.
    other = network(seed=5)
    qat.learn_ranges(other)
    parameters = qat.range_parameters(other)
    for source in (state, plain.state_dict()):
        other.load_state_dict(source)
        assert_same_ranges(ranges(other), ranges(model))
        assert qat.range_parameters(other).values() and all(
            a is b
            for a, b in zip(parameters.values(), qat.range_parameters(other).values(), strict=True)
        )
    other.load_state_dict(state, assign=True)
    assert torch.equal(other.eval()(images()), model(images()))
    assert len(qat.range_parameters(other)) == 6


def test_a_checkpoint_of_another_shape_is_an_error():
    model = network()
    qat.learn_ranges(model)
    state = model.state_dict() | {"0._weight_quantizer._amax": torch.ones(5, 1, 1, 1)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0._weight_quantizer._amax"):
        model.load_state_dict(state)


def test_a_range_that_stepped_across_zero_is_saved_positive():
    model = network()
    qat.learn_ranges(model)
    with torch.no_grad():
        model[0]._weight_quantizer._amax.neg_()
    y = model.eval()(images())
    state = model.state_dict()
    assert (state["0._weight_quantizer._amax"] > 0).all()
    assert torch.equal(model(images()), y)
    plain = network(calibrated=False).eval()
    plain.load_state_dict(state)
    assert torch.equal(plain(images()), y)


def test_programs_that_write_to_the_state_dict_reach_the_ranges():
    model = trained()
    for value in model.state_dict().values():
        value.mul_(2)
    assert model[0]._input_quantizer.amax == 2 * trained()[0]._input_quantizer.amax


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_learn_on_their_own(copied):
    model = trained()
    other = copied(model)
    assert torch.equal(other(images()), model(images()))
    held = ranges(model)
    train(other, torch.optim.SGD(other.parameters(), lr=1e-2))
    assert_same_ranges(ranges(model), held)
    assert not torch.equal(ranges(other)["0._input_quantizer"], held["0._input_quantizer"])
    buffer = io.BytesIO()
    torch.save(other, buffer)


def test_half_keeps_the_ranges_in_float32():
    model = trained()
    held = ranges(model)
    model.half().bfloat16()
    assert all(p.dtype == torch.float32 for p in qat.range_parameters(model).values())
    assert_same_ranges(ranges(model), held)


def test_calibrating_again_starts_the_ranges_anew():
    model, wanted = trained(), network(calibrated=False)
    parameters = list(qat.range_parameters(model).values())
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("_amax")}
    wanted.load_state_dict(weights, strict=False)
    for method in ("mse", "best"):
        for each in (model, wanted):
            # Long tails, for which the methods differ.
            calibrate(each.eval(), [images(64, seed=3) ** 5], method, progress=False)
        assert_same_ranges(ranges(model), ranges(wanted))
    compute_amax(model, "percentile", percentile=99.0)
    compute_amax(wanted, "percentile", percentile=99.0)
    assert_same_ranges(ranges(model), ranges(wanted))
    kept = zip(parameters, qat.range_parameters(model).values(), strict=True)
    assert all(a is b for a, b in kept)


def test_setting_the_range_of_a_learning_quantizer():
    model = network()
    qat.learn_ranges(model)
    quantizer = model[0]._input_quantizer
    parameter = quantizer._amax
    quantizer.amax = 2.5
    assert quantizer._amax is parameter and quantizer.amax == 2.5 and quantizer.amax.shape == ()
    quantizer._amax = torch.tensor(3.5)
    assert quantizer._amax is parameter and quantizer.amax == 3.5
    quantizer.amax = None
    assert quantizer.amax is None and not quantizer.calibrated
    quantizer.amax = 1.5
    assert quantizer.learned_range is not None and quantizer.amax == 1.5
    assert "learned" in repr(quantizer)
    with pytest.raises(RuntimeError, match="clipping needs a learned range"):
        quantizer.enable_clip()


def test_init_learn_amax_of_channels():
    model = network()
    qat.learn_ranges(model)
    quantizer = model[0]._weight_quantizer
    quantizer.amax = None
    quantizer.amax = torch.ones(4, 1, 1, 1)
    quantizer.init_learn_amax()
    assert quantizer.learned_range.shape == (4, 1, 1, 1)


def test_a_factor_on_amax_stays_a_factor():
    quantizer = TensorQuantizer(QuantDescriptor(scale_amax=0.5))
    model = nn.Sequential(quantizer)
    quantizer.amax = 2.0
    before = model(torch.linspace(-3, 3, 50))
    qat.learn_ranges(model)
    assert torch.equal(model(torch.linspace(-3, 3, 50)), before) and quantizer.amax == 2.0


def test_blocks_learn_one_range_each():
    quantizer = TensorQuantizer(QuantDescriptor(4, axis=-1, block_size=8))
    layer = quant_nn.QuantLinear(16, 3)
    layer._weight_quantizer = quantizer
    calibrate(layer, [torch.randn(4, 16)], progress=False)
    before, shape = layer(torch.ones(2, 16)), quantizer.amax.shape
    qat.learn_ranges(layer)
    y = layer(torch.ones(2, 16))
    assert torch.equal(y, before)
    y.square().sum().backward()
    assert quantizer._amax.grad.shape == shape and (quantizer._amax.grad != 0).all()


# Groups


def test_every_parameter_is_in_one_group():
    model = network()
    qat.learn_ranges(model)
    groups = {
        g["name"]: g for g in qat.parameter_groups(model, lr=0.1, weight_decay=1e-4, range_lr=0.01)
    }
    names = {id(p): name for name, p in model.named_parameters()}
    found = {key: [names[id(p)] for p in group["params"]] for key, group in groups.items()}
    assert found["weights"] == ["0.weight", "3.weight", "5.weight"]
    assert found["norm_and_bias"] == ["0.bias", "1.weight", "1.bias", "3.bias", "5.bias"]
    assert len(found["ranges"]) == 6 and sum(map(len, found.values())) == len(names)
    settings = {key: (group["lr"], group["weight_decay"]) for key, group in groups.items()}
    assert settings == {"weights": (0.1, 1e-4), "norm_and_bias": (0.1, 0), "ranges": (0.01, 0)}
    decaying = qat.parameter_groups(
        model, lr=0.1, weight_decay=1e-4, range_weight_decay=1e-5, decay_norm_and_bias=True
    )
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in decaying] == [
        ("weights", 0.1, 1e-4),
        ("ranges", 0.1, 1e-5),
    ]


def test_a_model_without_learned_ranges_has_no_such_group():
    assert [g["name"] for g in qat.parameter_groups(network(), lr=1)] == [
        "weights",
        "norm_and_bias",
    ]


# Export


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["ours", "current", "torchscript"])
def test_an_export_writes_the_learned_ranges_as_constants(tmp_path, way):
    model, path, x = trained(), tmp_path / "m.onnx", images()
    held = ranges(model)
    if way == "ours":
        export_onnx(model, x, path)
    else:
        torch.onnx.export(model, (x,), path, dynamo=way == "current", verbose=False)
    graph = onnx.load(path).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    scales = [
        constants[n.input[1]].flatten() for n in graph.node if n.op_type == "DequantizeLinear"
    ]
    wanted = [(amax / 127).numpy().flatten() for amax in held.values()]
    assert sorted(map(tuple, scales)) == sorted(map(tuple, wanted))
    (y,) = run_file(path, x.numpy())
    np.testing.assert_allclose(y, model(x).detach(), atol=1e-6)


def test_torch_export_without_gradients_keeps_one_node_a_quantizer():
    model = trained()
    program = torch.export.export(model, (images(),))
    assert torch.equal(program.module()(images()), model(images()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_compiles_in_one_graph_with_the_same_gradients(method):
    model = network()
    qat.learn_ranges(model, method)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (model, compiled):
        model.zero_grad()
        cross_entropy(run(images()), labels()).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1])
    assert all(q.learned_range.grad is not None for q in named_quantizers(model).values())
