"""Operands of calls, quantized while the forward runs, against NumPy."""

import copy
import operator
import pickle

import pytest
import torch
from hand_plans import Function, fq, place, plan, planned, quantized, rand
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.apply import apply_plan
from pytorch_quant.placement.call_sites import quantizer_key
from pytorch_quant.placement.plan import PlannedQuantizer

X, Y = rand(2, 6, seed=1), rand(2, 6, seed=2)


def plus(x, y):
    x += y
    return x


def float_functional(x, y):
    return torch.ao.nn.quantized.FloatFunctional().add(x, y)


ADDS = {
    "x + y": lambda x, y: x + y,
    "x += y": plus,
    "torch.add": torch.add,
    "keyword": lambda x, y: torch.add(x, other=y),
    "x.add": lambda x, y: x.add(y),
    "x.add_": lambda x, y: x.add_(y),
    "operator.add": operator.add,
    "operator.iadd": operator.iadd,
    "FloatFunctional": float_functional,
}


@pytest.mark.parametrize("spelling", ADDS)
def test_residual_addition_in_every_spelling(spelling):
    operand = ("other",) if spelling == "keyword" else (1,)
    model = quantized(Function(ADDS[spelling]), planned(place("add#0", *operand)), add=1)
    assert torch.equal(model(X.clone(), Y), X + fq(Y))


@pytest.mark.parametrize("spelling", ADDS)
def test_both_operands(spelling):
    operand = ("other",) if spelling == "keyword" else (1,)
    places = planned(place("add#0", 0)), planned(place("add#0", *operand), amax=0.5)
    model = quantized(Function(ADDS[spelling]), *places, add=1)
    assert torch.equal(model(X.clone(), Y), fq(X) + fq(Y, 0.5))


@pytest.mark.parametrize("spelling", ["x += y", "x.add_", "operator.iadd"])
@pytest.mark.parametrize("operand", [(0,), ("result",)])
def test_in_place_calls_still_write_to_their_tensor(spelling, operand):
    model = quantized(Function(ADDS[spelling]), planned(place("add#0", *operand)), add=1)
    x = X.clone()
    result = model(x, Y)
    assert result is x
    assert torch.equal(x, fq(X) + Y if operand == (0,) else fq(X + Y))


def test_in_place_write_to_a_quantized_operand_has_the_gradient_of_the_plain_call():
    model = quantized(Function(plus), planned(place("add#0", 0)), add=1)
    a, b = X.clone().requires_grad_(), Y.clone().requires_grad_()
    model(a * 1, b).sum().backward()
    assert torch.equal(a.grad, (X.abs() <= 1.5).float())
    assert torch.equal(b.grad, torch.ones_like(b))


def test_out_receives_the_quantized_result():
    def function(x, y, out):
        torch.add(x, y, out=out)
        return out

    model = quantized(Function(function), planned(place("add#0", "result")), add=1)
    assert torch.equal(model(X, Y, torch.empty(2, 6)), fq(X + Y))


@pytest.mark.parametrize("sequence", [list, tuple])
def test_entries_of_a_list(sequence):
    model = quantized(
        Function(lambda x, y: torch.cat(sequence((x, y, x)), 1)),
        planned(place("cat#0", 0, 0), place("cat#0", 0, 1)),
        cat=1,
    )
    assert torch.equal(model(X, Y), torch.cat([fq(X), fq(Y), X], 1))
    held = model._call_quantizers
    assert held.cat_0_input0_0 is held.cat_0_input0_1


def test_result():
    model = quantized(Function(lambda x: F.relu(x)), planned(place("relu#0", "result")), relu=1)
    assert torch.equal(model(X), fq(X.relu()))


def test_only_the_planned_call_of_a_kind():
    model = quantized(Function(lambda x, y: (x + y) + (y + x)), planned(place("add#1", 1)), add=3)
    assert torch.equal(model(X, Y), (X + Y) + (Y + fq(X)))


def test_calls_without_floats_do_not_count():
    def function(x, y):
        return x + y[torch.arange(2) + torch.zeros(2, dtype=torch.long)]

    model = quantized(Function(function), planned(place("add#0", 1)), add=1)
    assert torch.equal(model(X, Y), X + fq(Y))


PRODUCTS = {
    "matmul": (torch.matmul, (0,), (1,)),
    "@": (lambda a, b: a @ b, (0,), (1,)),
    "bmm": (torch.bmm, (0,), (1,)),
    "keywords": (lambda a, b: torch.bmm(input=a, mat2=b), ("input",), ("mat2",)),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (1,), (2,)),
}


@pytest.mark.parametrize("spelling", PRODUCTS)
def test_products(spelling):
    function, left, right = PRODUCTS[spelling]
    kind = "einsum" if spelling == "einsum" else "matmul"
    a, b = rand(2, 3, 4), rand(2, 4, 5, seed=1)
    places = planned(place(f"{kind}#0", *left)), planned(place(f"{kind}#0", *right), amax=0.7)
    model = quantized(Function(function), *places, **{kind: 1})
    torch.testing.assert_close(model(a, b), fq(a) @ fq(b, 0.7))


class Functional(nn.Module):
    """A convolution and a linear layer with parameters of their own."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(rand(4, 3, 3, 3))
        self.weight = nn.Parameter(rand(5, 4, seed=1))

    def forward(self, x):
        return F.linear(F.conv2d(x, weight=self.kernel).mean((2, 3)), self.weight)


def test_functional_layers_with_weights_per_channel():
    def amax(w):
        return w.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (w.dim() - 1))

    model, x = Functional(), rand(2, 3, 5, 5)
    kernel, weight = model.kernel, model.weight
    descriptor = QuantDescriptor(8, axis=0)
    calls = (place("conv#0", "weight"), place("linear#0", 1))
    places = [PlannedQuantizer(descriptor, (p,), "conv", "weight") for p in calls]
    inputs = planned(place("conv#0", 0)), planned(place("linear#0", 0))
    quantized(model, *places, *inputs, conv=1, linear=1)
    pooled = F.conv2d(fq(x), fq(kernel, amax(kernel).numpy())).mean((2, 3))
    expected = F.linear(fq(pooled), fq(weight, amax(weight).numpy()))
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert kernel.grad is not None


def test_keys_are_names_without_dots():
    assert quantizer_key("add#0", (1,)) == "add_0_input1"
    assert quantizer_key("cat#12", (0, 2)) == "cat_12_input0_2"
    assert quantizer_key("linear#0", ("weight",)) == "linear_0_weight"


# Frames


class Inner(nn.Module):
    def forward(self, x):
        return x + x


class Caught(nn.Module):
    def forward(self, x):
        x + x
        raise KeyError("caught outside")


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, y):
        try:
            x = self.inner(x)
        except KeyError:
            x = x * 1
        return x + y


@pytest.mark.parametrize("inner", [Inner, Caught])
def test_calls_of_inner_modules_do_not_count(inner):
    model = quantized(Outer(inner()), planned(place("add#0", 1)), add=1)
    assert torch.equal(model(X, Y), (2 * X if inner is Inner else X) + fq(Y))


def test_frames_within_frames():
    model = Outer(Outer(Inner()))
    model.inner.forward = lambda x: Outer.forward(model.inner, x, Y)
    counts = {"": {"add": 1}, "inner": {"add": 1}, "inner.inner": {"add": 1}}
    places = [planned(place("add#0", 1, module=name)) for name in counts]
    apply_plan(model, plan(*places, counts=counts))
    assert torch.equal(model(X, Y), (X + fq(X) + fq(Y)) + fq(Y))


def test_a_hook_counts_as_part_of_its_module():
    model = Outer(Inner())
    model.inner.register_forward_hook(lambda module, args, result: result + 1)
    quantized(model, planned(place("add#0", 1)), add=1)
    assert torch.equal(model(X, Y), 2 * X + 1 + fq(Y))


def test_quantized_layers_do_not_count_nor_their_calibration():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.pool = nn.AdaptiveAvgPool1d(3)
            self.weight = nn.Parameter(rand(6, 6))

        def forward(self, x):
            return F.adaptive_avg_pool1d(F.linear(self.layer(x), self.weight), 3) + self.pool(x)

    model = Mixed()
    layer = [planned(place(None, name, module="layer"), amax=None) for name in ("input", "weight")]
    pool = planned(place(None, "input", module="pool"), amax=None)
    sites = [planned(place(s, 0), amax=None) for s in ("linear#0", "adaptive_avg_pool#0", "add#0")]
    counts = {"": {"linear": 1, "adaptive_avg_pool": 1, "add": 1, "mul": 0, "div": 0, "abs": 0}}
    apply_plan(model, plan(*layer, pool, *sites, counts=counts))
    model(X)
    for module in model.modules():
        if hasattr(module, "enable_calib"):
            module.disable_quant()
            module.enable_calib()
    assert model(X).shape == (2, 3)


def test_a_forward_that_is_called_by_itself_is_quantized():
    model = quantized(Outer(Inner()), planned(place("add#0", 1)), add=1)
    assert torch.equal(model.forward(X, Y), 2 * X + fq(Y))


def test_a_users_mode_outside_sees_the_calls():
    class Seen(torch.overrides.TorchFunctionMode):
        names = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names += (func.__name__,)
            return func(*args, **(kwargs or {}))

    model = quantized(Function(torch.matmul), planned(place("matmul#0", 0)), matmul=1)
    with Seen() as seen:
        model(rand(2, 3), rand(3, 2))
    assert seen.names.count("matmul") == 1


# Errors


def test_a_call_that_is_missing():
    model = Outer(Inner())
    model.inner = Function(lambda x, y: x + y if x.sum() > 1e9 else x)
    counts = {"inner": {"add": 1}}
    model.forward = lambda x, y: model.inner(x, y)
    apply_plan(model, plan(planned(place("add#0", 1, module="inner")), counts=counts))
    told = r"inner/add#0 not met: inner made 0 calls of 'add', 1 were recorded; quantize\(\)"
    with pytest.raises(RuntimeError, match=told):
        model(X, Y)


def test_a_call_too_many_is_told_when_it_happens():
    happened = []

    def function(x, y):
        z = (x + y) + y
        happened.append("after")
        return z

    model = quantized(Function(function), planned(place("add#0", 1)), add=1)
    with pytest.raises(
        RuntimeError, match=r"^/add#1: Function makes more calls of 'add' than the 1"
    ):
        model(X, Y)
    assert not happened


class InTraining(nn.Module):
    """A sum that is quantized, and what training adds to it."""

    def __init__(self, training):
        super().__init__()
        self.in_training = training

    def forward(self, x, y):
        if self.training and self.in_training == "before":
            x = x + y.sin()
        for _ in range(2 if self.training and self.in_training == "again" else 1):
            x = x + y
        if self.training and self.in_training == "after":
            return x, y.abs() + 1
        return x


def test_calls_of_training_alone_may_follow_the_quantized_ones():
    model = quantized(InTraining("after"), planned(place("add#0", 1)), add=1)
    assert torch.equal(model.eval()(X, Y), X + fq(Y))
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    model.register_forward_hook(lambda module, args, result: None)
    first, second = model.train()(X, Y)
    assert torch.equal(first, X + fq(Y)) and torch.equal(second, Y.abs() + 1)
    assert torch.equal(model.eval()(X, Y), X + fq(Y))


@pytest.mark.parametrize("when", ["before", "again", "after"])
def test_calls_of_training_alone_never_move_the_quantized_ones(when):
    model = quantized(InTraining(when), planned(place("add#0", 1)), add=1)
    if when != "after":
        # In that case nothing shows yet where the quantized call stands.
        model.eval()(X, Y)
    told = r"leave the quantized calls float with the rules \{'/add#0': None\}"
    with pytest.raises(RuntimeError, match=f"^/add#1: .* {told}"):
        model.train()(X, Y)


class Recomputed(nn.Module):
    """A part of the forward that holds a sum and a product, one of them quantized."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def part(self, x):
        return (x + 1) * 2

    def forward(self, x):
        if self.reentrant is None:
            return self.part(x)
        return checkpoint(self.part, x, use_reentrant=self.reentrant) - x


@pytest.mark.parametrize("reentrant", [True, False])
def test_quantized_calls_that_the_backward_pass_would_run_again(reentrant):
    model = quantized(Recomputed(reentrant), planned(place("add#0", 0)), add=1)
    told = r"^/add#0 is in a part of the forward of Recomputed that torch.utils.checkpoint"
    with pytest.raises(RuntimeError, match=told):
        model(X.clone().requires_grad_())
    with torch.no_grad():
        # Nothing is kept for a backward pass.
        assert torch.equal(model(X.clone().requires_grad_()), (fq(X) + 1) * 2 - X)
    whole = quantized(Recomputed(None), planned(place("add#0", 0)), add=1)
    x = X.clone().requires_grad_()
    checkpoint(whole, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, 2.0 * (X.abs() <= 1.5))


@pytest.mark.parametrize("reentrant", [True, False])
def test_calls_beside_the_quantized_ones_may_be_run_again(reentrant):
    model = quantized(Recomputed(reentrant), planned(place("sub#0", 1)), add=1, sub=1)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert torch.equal(x.grad, 2.0 - (X.abs() <= 1.5).float())


def test_an_operand_that_is_no_tensor():
    model = quantized(Function(lambda x, y: x + y), planned(place("add#0", 1)), add=1)
    with pytest.raises(RuntimeError, match=r"^/add#0: there is no tensor at input1"):
        model(X, 2.0)


def test_other_kinds_come_and_go_and_errors_of_the_model_pass():
    def function(x, y):
        if y is None:
            raise KeyError("the model's own")
        return x + (y * 2 * 2 if len(y) == 2 else y)

    model = quantized(Function(function), planned(place("add#0", 1)), add=1)
    assert torch.equal(model(X, Y), X + fq(Y * 4))
    assert torch.equal(model(X, Y[:1]), X + fq(Y[:1]))
    with pytest.raises(KeyError, match="own"):
        model(X, None)
    assert torch.equal(model(X, Y), X + fq(Y * 4))
    assert torch._C._len_torch_function_stack() == 0
