"""Recording a forward pass: kinds, sites, producers, and a model that is left as it was."""

import gc
import operator
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytorch_quant import quant_modules
from pytorch_quant.dataflow import Ref, record
from pytorch_quant.nn import TensorQuantizer


class Function(nn.Module):
    """Two convolutions and a function of both."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.function = function

    def forward(self, x):
        return self.function(self.a(x), self.b(x))


def iadd(x, y):
    x += y
    return x


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
ADDS = {
    "x + y": lambda x, y: x + y,
    "x += y": iadd,
    "torch.add": torch.add,
    "out=": lambda x, y: torch.add(x, y, out=torch.empty(x.shape)),
    "x.add": lambda x, y: x.add(y),
    "x.add_": lambda x, y: x.add_(y),
    "operator.iadd": operator.iadd,
    "operator.add": operator.add,
    "aten": torch.ops.aten.add.Tensor,
    "FloatFunctional": lambda x, y: torch.ao.nn.quantized.FloatFunctional().add(x, y),
}


def sites(flow):
    return [call.site for call in flow.calls]


@pytest.mark.parametrize("name", ADDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_spelling_of_a_residual_add(name):
    flow = record(Function(ADDS[name]), IMAGE)
    add = next(call for call in flow.calls if call.op == "add")
    assert add.site == "/add#0"
    producers = [flow.producer(value) for value in add.inputs[:2]]
    assert [producer.site for producer in producers] == ["a/conv#0", "b/conv#0"]
    assert flow.outputs == add.outputs[:1]
    for producer in producers:
        assert add in flow.consumers(producer.outputs[0])


def linear(x, y):
    return F.linear(x, torch.ones(4, 8)) + y.sum()


KINDS = {
    "sub": [lambda x, y: x - y, lambda x, y: 1 - x, torch.subtract],
    "mul": [lambda x, y: x * y, lambda x, y: 2 * x, lambda x, y: x.mul_(y)],
    "div": [lambda x, y: x / y, lambda x, y: 1 / x, torch.true_divide],
    "cat": [lambda x, y: torch.cat([x, y]), lambda x, y: torch.concat((x, y), 1)],
    "stack": [lambda x, y: torch.stack([x, y])],
    "matmul": [
        lambda x, y: x @ y,
        torch.matmul,
        lambda x, y: torch.bmm(x[0], y[0]),
        lambda x, y: x[0, 0].mm(y[0, 0]),
        lambda x, y: torch.baddbmm(x[1], x[0], y[0]),
    ],
    "einsum": [lambda x, y: torch.einsum("nchw,nchw->n", x, y)],
    "conv": [lambda x, y: F.conv3d(x[None], torch.ones(1, 2, 1, 1, 1))],
    "conv_transpose": [lambda x, y: F.conv_transpose2d(x, torch.ones(3, 1, 2, 2))],
    "linear": [linear],
    "scaled_dot_product_attention": [lambda x, y: F.scaled_dot_product_attention(x, y, y)],
    "softmax": [lambda x, y: F.softmax(x, 1), lambda x, y: x.softmax(1), nn.Softmax(1)],
    "relu": [lambda x, y: F.relu(x), lambda x, y: x.relu_(), lambda x, y: F.relu(x, inplace=True)],
    "clamp": [
        lambda x, y: F.relu6(x),
        lambda x, y: nn.ReLU6(True)(x),
        lambda x, y: F.hardtanh(x),
        lambda x, y: x.clip(0, 1),
        lambda x, y: x.clamp_min_(0),
    ],
    "leaky_relu": [lambda x, y: F.leaky_relu_(x)],
    "sigmoid": [lambda x, y: x.sigmoid(), lambda x, y: torch.sigmoid_(x)],
    "gelu": [lambda x, y: F.gelu(x)],
    "silu": [lambda x, y: F.silu(x, inplace=True)],
    "hardswish": [lambda x, y: F.hardswish(x)],
    "batch_norm": [lambda x, y: nn.BatchNorm2d(3).eval()(x)],
    "layer_norm": [lambda x, y: F.layer_norm(x, (8,))],
    "group_norm": [lambda x, y: F.group_norm(x, 1)],
    "max_pool": [
        lambda x, y: F.max_pool2d(x, 2),
        lambda x, y: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x, y: torch.max_pool2d(x, 2),
    ],
    "avg_pool": [lambda x, y: F.avg_pool2d(x, 2), lambda x, y: F.avg_pool1d(x[0], 2)],
    "adaptive_avg_pool": [lambda x, y: F.adaptive_avg_pool2d(x, 1)],
    "mean": [lambda x, y: x.mean((2, 3))],
    "transpose": [lambda x, y: x.mT, lambda x, y: x.transpose(0, 1), lambda x, y: x[0, 0].t()],
    "getitem": [lambda x, y: x[:, 1:]],
    "chunk": [lambda x, y: x.chunk(3, 1)],
    "split": [lambda x, y: torch.split(x, 1, 1), lambda x, y: x.split([1, 2], 1)],
    "dropout": [lambda x, y: F.dropout(x, training=False)],
    "interpolate": [lambda x, y: F.interpolate(x, scale_factor=2)],
    "pad": [lambda x, y: F.pad(x, (1, 1))],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    for function in KINDS[kind]:
        if isinstance(function, nn.Module):
            flow = record(nn.Sequential(nn.Conv2d(3, 3, 1), function), IMAGE)
        else:
            flow = record(Function(function), IMAGE)
        # Function has two convolutions of its own.
        own = 2 * (kind == "conv")
        assert sum(call.op == kind for call in flow.calls) == 1 + own, sites(flow)


def test_a_write_makes_a_new_value():
    def function(x, y):
        z = F.relu(x, inplace=True)
        y[:, 0] = 0
        return z + x + y

    flow = record(Function(function), IMAGE)
    relu, setitem = (next(c for c in flow.calls if c.op == op) for op in ("relu", "setitem"))
    first, second = (call for call in flow.calls if call.op == "add")
    assert flow.producer(relu.inputs[0]).site == "a/conv#0" and relu.outputs != relu.inputs
    # The tensor and the result are one object, so both operands are the new version.
    assert first.inputs == relu.outputs * 2
    assert flow.producer(second.inputs[1]) is setitem
    assert setitem.args[1:] == ((slice(None), 0), 0)


def test_a_write_through_a_view_is_not_overlooked():
    def function(x, y):
        x.view(-1).mul_(2)
        return x + y

    flow = record(Function(function), IMAGE)
    add = next(call for call in flow.calls if call.op == "add")
    assert flow.producer(add.inputs[0]) is None


@dataclass
class Result:
    hidden: torch.Tensor
    more: dict


class Winding(nn.Module):
    """What torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.shared, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, *args, scale=None):
        x = torch.zeros(args[0].shape[0], 4)
        for item in args:
            x = x + self.shared(item)
        if x.shape[0] > 2 and float(x.abs().sum()) >= 0:
            x = self.other(x)
        if scale is not None:
            x = x * scale
        return Result(x, {"mean": [x.mean()]})


def test_control_flow_arguments_and_outputs():
    model = Winding()
    x = torch.randn(3, 4)
    flow = record(model, [x, x, torch.randn(3, 4)])
    linears = [(c.site, c.run) for c in flow.calls if c.op == "linear"]
    assert linears == [("shared/linear#0", run) for run in range(3)] + [("other/linear#0", 0)]
    assert flow.runs == ["", "shared", "shared", "shared", "other"]
    assert [s for s in sites(flow) if "add" in s] == ["/add#0", "/add#1", "/add#2"]
    # Made of no float tensor, so without a number.
    assert sites(flow)[0] == "/zeros"
    assert flow.inputs[0] == flow.inputs[1] != flow.inputs[2]
    assert [flow.producer(value).op for value in flow.outputs] == ["linear", "mean"]
    call = next(c for c in flow.calls if c.op == "linear")
    weight = call.argument(1, "weight")
    assert isinstance(weight, Ref) and flow.values[weight.value].parameter == "shared.weight"
    assert flow.modules["shared"] is model.shared

    short = record(model, (torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)))
    assert "other/linear#0" not in sites(short)
    named = record(Function(torch.add), {"x": IMAGE})
    assert sites(named) == ["a/conv#0", "b/conv#0", "/add#0"]


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_opened(need_weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x, need_weights=need_weights)[0]

    flow = record(Attention().eval(), torch.randn(2, 5, 8))
    found = [c.site for c in flow.calls if c.op in ("linear", "matmul", "softmax")]
    inside = ["inner/matmul#0", "inner/softmax#0", "inner/matmul#1"]
    assert found == ["inner/linear#0", *(inside if need_weights else []), "inner/linear#1"]
    assert need_weights or "inner/scaled_dot_product_attention#0" in sites(flow)


def test_fused_encoder_layers_are_opened():
    fused = torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    flow = record(layer, torch.randn(2, 5, 8))
    assert {"/add#0", "/add#1", "linear1/linear#0", "self_attn/linear#1"} <= set(sites(flow))
    assert torch.backends.mha.get_fastpath_enabled() == fused


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_module_is_one_call():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    flow = record(nn.Sequential(nn.Linear(8, 8), scripted, nn.Linear(8, 4)), torch.randn(2, 8))
    assert sites(flow) == ["0/linear#0", "1/script#0", "2/linear#0"]
    assert flow.producer(flow.calls[2].inputs[0]).op == "script"


def vision_model(name):
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    options = {"init_weights": False} if name == "googlenet" else {}
    return getattr(models, name)(weights=None, **options)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("resnet18", {"conv": 20, "batch_norm": 20, "relu": 17, "add": 8, "linear": 1}),
        ("mobilenet_v2", {"conv": 52, "clamp": 35, "add": 10, "dropout": 1}),
        ("googlenet", {"conv": 57, "max_pool": 13, "cat": 9}),
    ],
)
def test_vision_models(name, counts):
    model = vision_model(name)
    flow = record(model, torch.randn(2, 3, 64, 64))
    assert {op: sum(c.op == op for c in flow.calls) for op in counts} == counts
    # All that is there comes from a call, the model or its input.
    loose = [v.index for v in flow.values if v.producer is None and v.parameter is None]
    assert loose == list(flow.inputs)
    assert model.training


def test_quantizers_are_transparent():
    plain = record(vision_model("resnet18"), torch.randn(1, 3, 64, 64))
    with quant_modules.initialize():
        model = vision_model("resnet18")
    model.conv1._input_quantizer.pre_quant_scale = 2.0
    model.eval()
    flow = record(model, torch.randn(1, 3, 64, 64))
    assert sites(flow) == sites(plain)
    assert [c.inputs for c in flow.calls] == [c.inputs for c in plain.calls]
    assert flow.quantizers["conv1._input_quantizer"] == list(flow.inputs)
    (weight,) = flow.quantizers["fc._weight_quantizer"]
    assert flow.values[weight].parameter == "fc.weight"
    assert all(not m._if_calib and m._if_quant for m in model.modules() if hasattr(m, "_if_calib"))


class Failing(nn.Module):
    def __init__(self, fails):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.quantizer = TensorQuantizer(if_calib=True)
        self.register_buffer("steps", torch.zeros(()))
        self.fails = fails

    def forward(self, x):
        self.steps += 1
        y = self.norm(self.first(self.quantizer(x))) + torch.rand(4)
        if self.fails:
            raise KeyError("inner")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Failing(fails)
    seen = []
    model.first.register_forward_hook(lambda *_: seen.append(torch.ones(1) + 1))
    model.first.register_forward_pre_hook(lambda _, args: args[0] * 2)
    model.first.eval()
    hooks = [[len(m._forward_hooks), len(m._forward_pre_hooks)] for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(KeyError, match="inner"):
            record(model, torch.randn(3, 4, generator=torch.Generator()))
    else:
        flow = record(model, torch.randn(3, 4, generator=torch.Generator()))
        assert {"first/add#0", "first/mul#0"} <= set(sites(flow))
    assert len(seen) == 1
    assert [[len(m._forward_hooks), len(m._forward_pre_hooks)] for m in model.modules()] == hooks
    assert not any(m._forward_hooks_always_called for m in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks
    assert model.training and model.norm.training and not model.first.training
    assert model.quantizer._if_calib and model.quantizer._if_quant
    assert model.quantizer.calibrator.compute_amax() is None
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_error_that_the_model_catches():
    class Catching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = Failing(True), nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.inner(x)
            except KeyError:
                return self.other(x) + 1

    flow = record(Catching(), torch.randn(3, 4))
    assert sites(flow)[-2:] == ["other/linear#0", "/add#0"]


def test_values_are_not_kept_alive():
    alive = []

    class Watching(nn.Module):
        def forward(self, x):
            made = []
            for _ in range(4):
                x = x * 2
                made.append(weakref.ref(x))
                alive.append(sum(ref() is not None for ref in made))
            return x

    flow = record(Watching(), torch.randn(8))
    gc.collect()
    assert alive == [1, 1, 1, 1] and len(flow.calls) == 4
