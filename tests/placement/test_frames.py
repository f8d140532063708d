"""What can be done with a model whose calls are quantized: save, copy, compile, export, train."""

import contextlib
import copy
import inspect
import io
import warnings
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hand_plans import Function, fq, place, plan, planned, quantized, rand
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from pytorch_quant.placement.apply import apply_plan
from pytorch_quant.placement.frames import framed_class

X = rand(2, 3, 6, 6)


class Block(nn.Module):
    """A residual block, with an inner module that adds as well."""

    def __init__(self, inner=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.inner = inner

    def forward(self, x):
        """Add."""
        y = self.conv(x)
        if self.inner is not None:
            y = self.inner(y)
        y += x
        return y


def block(amax=0.5):
    model = Block(Block())
    layer = [planned(place(None, name, module="conv")) for name in ("input", "weight")]
    sites = [planned(place("add#0", 1, module=name), amax=amax) for name in ("", "inner")]
    counts = {"": {"add": 1}, "inner": {"add": 1}}
    return apply_plan(model, plan(*layer, *sites, counts=counts))


def by_hand(model, x):
    """The same with the quantizers called in the open."""
    y = F.conv2d(fq(x), fq(model.conv.weight), model.conv.bias, padding=1)
    inner = model.inner.conv
    return F.conv2d(y, inner.weight, inner.bias, padding=1) + fq(y, 0.5) + fq(x, 0.5)


def test_it_looks_like_what_it_was():
    model = block()
    assert type(model).__name__ == "Block" and type(model).__qualname__ == "Block"
    assert type(model).__module__ == Block.__module__ and type(model).forward.__doc__ == "Add."
    assert isinstance(model, Block)
    assert type(model) is framed_class(Block, sited=True) is framed_class(type(model))
    torch.testing.assert_close(model(X), by_hand(model, X))


class Keywords(nn.Module):
    def forward(self, x, *more, scale: float = 1.0, **rest):
        return (x + x) * scale


def test_the_signature_stays():
    model = quantized(Keywords(), planned(place("add#0", 0)), add=1)
    for inspected in (inspect.signature, inspect.getfullargspec):
        assert inspected(model.forward) == inspected(Keywords().forward)
    torch.testing.assert_close(model(X, scale=2.0), 2 * (fq(X) + X))


def same(model, other, x=X):
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(other(x), by_hand(model, x))


def test_deep_copy():
    model = block()
    copied = copy.deepcopy(model)
    assert type(copied) is type(model) and type(copied.inner) is type(model.inner)
    same(model, copied)
    copied._call_quantizers.add_0_input1.amax = 0.1
    assert not torch.equal(copied(X), model(X))
    same(model, model)


def test_pickle_of_the_whole_model():
    model, file = block(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(model) and type(loaded.inner) is type(model.inner)
    same(model, loaded)


def test_state_dict_into_a_second_model():
    model, other = block(), block(amax=None)
    state = model.state_dict()
    assert {"_call_quantizers.add_0_input1._amax", "inner._call_quantizers.add_0_input1._amax"} < {
        *state
    }
    assert set(state) - set(Block(Block()).state_dict()) == {k for k in state if "quantizer" in k}
    other.load_state_dict(state)
    same(model, other)


def fake_quantizations(program):
    return sum("fake_quant" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = block().eval()
    with warnings.catch_warnings():
        # A strict export speaks of side effects, which are the counters of the frame.
        warnings.simplefilter("ignore", UserWarning)
        program = torch.export.export(model, (X,), strict=strict)
    assert fake_quantizations(program) == 4
    torch.testing.assert_close(program.module()(X), by_hand(model, X))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    model = block()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    same(model, compiled)
    model.zero_grad()
    compiled(X).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(X).sum().backward()
    for grad, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


# The compiler itself asks tensors for gradients where a graph starts in the middle of a model.
asks_for_gradients = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)


class Breaks(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x * 1


REGIONS = {
    "model.compile()": lambda model: model.compile(backend="eager", fullgraph=True),
    "child.compile()": lambda model: model.inner.compile(backend="eager", fullgraph=True),
    "layer.compile()": lambda model: model.conv.compile(backend="eager", fullgraph=True),
    "torch.compile(child)": lambda model: setattr(
        model, "inner", torch.compile(model.inner, backend="eager")
    ),
}


@asks_for_gradients
@pytest.mark.parametrize("region", REGIONS)
def test_compile_of_parts(region):
    model = block()
    expected = model(X)
    REGIONS[region](model)
    for _ in range(2):
        torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


@asks_for_gradients
def test_a_part_that_is_compiled_as_one_graph_by_itself_is_refused():
    torch._dynamo.reset()
    model = block()
    model.inner = torch.compile(model.inner, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"Block is compiled by itself|Observed exception"):
        model(X)


@asks_for_gradients
def test_compile_with_a_break_in_the_graph():
    site = planned(place("add#0", 1), amax=0.5)
    model = apply_plan(Block(Breaks()), plan(site, counts={"": {"add": 1}}))
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(X), model(X), rtol=0, atol=0)


@pytest.mark.slow
def test_each_class_has_a_limit_of_its_own_in_the_compiler():
    classes = [type(f"Part{i}", (Block,), {}) for i in range(10)]
    for kind in classes:
        model = apply_plan(kind(), plan(planned(place("add#0", 1)), counts={"": {"add": 1}}))
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="eager")(X), model(X)
        )


def graph_of(model, dynamo, x, path):
    options = {"verbose": False} if dynamo else {}
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, (x,), path, dynamo=dynamo, **options)
    return onnx.load(path).graph


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("operand", [0, 1])
def test_onnx(dynamo, operand, tmp_path):
    model = Block().eval()
    apply_plan(model, plan(planned(place("add#0", operand), amax=0.5), counts={"": {"add": 1}}))
    graph = graph_of(model, dynamo, X, tmp_path / "model.onnx")
    makers = {name: node for node in graph.node for name in node.output}
    (add,) = [node for node in graph.node if node.op_type == "Add"]
    ops = [getattr(makers.get(name), "op_type", "") for name in add.input]
    assert ops == (["Conv", "DequantizeLinear"] if operand else ["DequantizeLinear", ""])
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {graph.input[0].name: X.numpy()})
    np.testing.assert_allclose(got, model(X).detach().numpy(), atol=0.005)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_of_attention(dynamo, tmp_path):
    kind = "scaled_dot_product_attention"
    model = quantized(
        Function(lambda x: F.scaled_dot_product_attention(x, x, x)),
        *[planned(place(f"{kind}#0", o)) for o in (0, 1, 2, "probabilities")],
        **{kind: 1},
    )
    graph = graph_of(model.eval(), dynamo, rand(1, 2, 4, 8), tmp_path / "model.onnx")
    makers = {name: node for node in graph.node for name in node.output}
    first, second = (node for node in graph.node if node.op_type == "MatMul")

    def above(name):
        while makers[name].op_type == "Transpose":
            name = makers[name].input[0]
        return makers[name].op_type

    assert [above(name) for name in (*first.input, *second.input)] == ["DequantizeLinear"] * 4
    softmax = next(node for node in graph.node if node.op_type == "Softmax")
    assert makers[softmax.input[0]] is first or makers[softmax.input[0]].op_type == "MatMul"
    scaled = next(node for node in graph.node if node.op_type == "Mul")
    (entry,) = [node for node in graph.node if scaled.output[0] in node.input]
    assert entry.op_type == "QuantizeLinear"


def test_distributed_data_parallel(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    try:
        model = block()
        parallel = nn.parallel.DistributedDataParallel(model)
        same(model, parallel)
        parallel(X).sum().backward()
        assert model.conv.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


class Recomputed(nn.Module):
    def __init__(self, inner, recompute):
        super().__init__()
        self.inner, self.recompute = inner, recompute

    def forward(self, x):
        if self.recompute:
            y = checkpoint(self.inner, x, use_reentrant=False)
        else:
            y = self.inner(x)
        return y + x


def test_checkpoint_recomputes_the_same():
    grads = []
    for recompute in (True, False):
        torch.manual_seed(0)
        model = Recomputed(Block(), recompute)
        counts = {"": {"add": 1}, "inner": {"add": 1}}
        sites = [planned(place("add#0", 1, module=name), amax=0.5) for name in counts]
        apply_plan(model, plan(*sites, counts=counts))
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)


def test_what_held_the_model_keeps_working():
    model = Block()
    seen = []
    model.register_forward_hook(lambda m, args, result: seen.append(result))
    model.conv.register_forward_pre_hook(lambda m, args: seen.append(args))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight = model.conv.weight
    layer = [planned(place(None, name, module="conv")) for name in ("input", "weight")]
    site = planned(place("add#0", 1))
    apply_plan(model, plan(*layer, site, counts={"": {"add": 1}}))
    assert model.conv.weight is weight
    before = weight.detach().clone()
    model(X).sum().backward()
    optimizer.step()
    assert len(seen) == 2 and not torch.equal(weight, before)


def test_new_quantizers_follow_train_and_eval_and_dtype():
    model = Block().eval().double()
    apply_plan(model, plan(planned(place("add#0", 1)), counts={"": {"add": 1}}))
    assert not any(module.training for module in model.modules())
    assert model(X.double()).dtype == torch.float64


def test_a_parametrized_layer_is_quantized_at_its_call():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    model = nn.Sequential(nn.Linear(6, 4))
    parametrize.register_parametrization(model[0], "weight", Halved())
    sites = [planned(place("linear#0", i, module="0")) for i in (0, 1)]
    apply_plan(model, plan(*sites, counts={"0": {"linear": 1}}))
    x, layer = rand(3, 6), model[0]
    expected = F.linear(fq(x), fq(layer.weight), layer.bias)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)


def test_parametrizations_of_a_quantized_layer_are_removed():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    model = nn.Sequential(nn.Linear(6, 4))
    weight = model[0].weight.detach().clone()
    for name in ("weight", "bias"):
        parametrize.register_parametrization(model[0], name, Halved())
    apply_plan(model, plan(planned(place("linear#0", 0, module="0")), counts={"0": {"linear": 1}}))
    x, layer = rand(3, 6), model[0]
    expected = model(x)
    kind = parametrize.type_before_parametrizations(layer)
    assert type(layer) is framed_class(type(layer)) and issubclass(kind, nn.Linear)
    parametrize.remove_parametrizations(layer, "bias")
    torch.testing.assert_close(model(x), expected)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is kind is framed_class(nn.Linear, sited=True)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(expected, F.linear(fq(x), weight / 2, layer.bias))
    parametrize.register_parametrization(layer, "weight", Halved())
    assert type(layer) is framed_class(type(layer))
    torch.testing.assert_close(model(x), F.linear(fq(x), weight / 4, layer.bias))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is kind


def test_subclass_registries_do_not_see_the_framed_class():
    class Registered(nn.Module):
        classes: ClassVar[list] = []

        def __init_subclass__(cls, *, needed):
            Registered.classes.append(cls)

        def forward(self, x):
            return x + x

    model = quantized(Registered(), planned(place("add#0", 0)), add=1)
    assert torch.equal(model(X), fq(X) + X) and Registered.classes == []
