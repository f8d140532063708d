"""Plans of small networks written by hand, and of torchvision's."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytorch_quant.dataflow import record
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn import TensorQuantizer
from pytorch_quant.placement.planning import make_plan
from pytorch_quant.quant_modules import quantized_modules
from pytorch_quant.scheme import (
    FP8,
    INT4_WEIGHT_ONLY,
    INT8,
    INT8_DYNAMIC,
    INT8_PER_TENSOR,
    Scheme,
)

IMAGE = (16, 8, 8)
TOKENS = (20, 32)


def conv(c_in=16, c_out=16, kernel=1, **options):
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, **options)


def conv_bn(c_in=16, c_out=16, kernel=1, **options):
    return nn.Sequential(conv(c_in, c_out, kernel, **options), nn.BatchNorm2d(c_out))


def planned(model, shape=IMAGE, rules=None, placement="tensorrt", batch=2):
    model.eval()
    return make_plan(model, record(model, torch.randn(batch, *shape)), rules, placement)


def written(place):
    operand = ".".join(map(str, place.operand))
    return f"{place.site} {operand}" if place.call is None else f"{place.site}[{operand}]"


def places(plan, weights=False):
    """The quantizers of a plan, each as the set of its places."""
    found = [[written(place) for place in q.places] for q in plan.quantizers]
    return [" = ".join(p) for p in found if weights or not p[0].endswith("weight")]


def left(plan):
    return {entry.site: entry.reason for entry in plan.left}


class Net(nn.Module):
    """Modules by name, and a function of them and the input."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


# Layers


def test_layers_share_the_quantizer_of_a_tensor():
    net = Net(
        lambda m, x: m.a(x) * m.b(x.contiguous()) + m.c(x.flatten(2).unflatten(2, (8, 8))).sum(),
        **{name: conv() for name in "abc"},
    )
    assert places(planned(net)) == ["a input = b input = c input"]


def test_weights_have_the_axis_of_their_output_channels():
    layers = {
        "a": (nn.Conv2d(16, 32, 1), 0),
        "b": (nn.ConvTranspose2d(32, 16, 1), 1),
        "c": (nn.ConvTranspose2d(16, 32, 1, groups=2), None),
        "d": (nn.Linear(64, 32), 0),
    }
    net = Net(
        lambda m, x: m.d(m.c(m.b(m.a(x))).flatten(2)),
        **{n: layer for n, (layer, _) in layers.items()},
    )
    axes = {
        q.places[0].module: q.descriptor.axis
        for q in planned(net).quantizers
        if q.places[0].operand == ("weight",)
    }
    assert axes == {name: axis for name, (_, axis) in layers.items()}


def test_a_layer_that_did_not_run_has_quantizers_of_its_own():
    net = Net(lambda m, x: m.a(x), a=conv(), aux=nn.Sequential(conv(), nn.ReLU(), nn.Linear(16, 2)))
    plan = planned(net)
    assert places(plan, weights=True) == [
        "a input", "a weight", "aux.0 input", "aux.0 weight",
    ]  # fmt: skip
    assert "(H2)" in left(plan)["aux.2"]


def test_a_shared_layer_has_one_quantizer_for_all_its_inputs():
    net = Net(lambda m, x: m.b(m.a(m.a(x).relu())) + m.b(x).sum(), a=conv(), b=conv())
    # One quantizer for x, for relu(a(x)) and for what b takes.
    assert places(planned(net)) == ["a input = b input"]


def test_padding_comes_after_the_quantizer_of_a_layer():
    net = Net(
        lambda m, x: m.a(x) * m.b(x),
        a=nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
        b=conv(),
    )
    assert places(planned(net)) == ["a input = b input"]


def test_a_constant_input_is_left():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("grid", torch.ones(4, 16))
            self.mlp, self.fc = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.fc(x) + self.mlp(self.grid)

    plan = planned(Bias(), (4, 16))
    assert places(plan) == ["fc input"]
    assert "does not depend" in left(plan)["mlp"]


def test_recurrent_layers_only_by_a_rule():
    net = Net(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(32, 16))
    plan = planned(net, TOKENS)
    assert places(plan) == [] and "(L15)" in left(plan)["rnn"]
    assert places(planned(net, TOKENS, {nn.LSTM: INT8}), True) == ["rnn input", "rnn weight"]
    gru = Net(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(32, 16))
    assert places(planned(gru, TOKENS, {"rnn": INT8}), True) == ["rnn input", "rnn weight"]


def test_max_pooling_only_by_a_rule():
    net = Net(lambda m, x: m.a(x) + m.pool(x).sum(), a=conv(), pool=nn.MaxPool2d(2))
    assert places(planned(net)) == ["a input"]
    assert places(planned(net, rules={nn.MaxPool2d: INT8})) == ["a input = pool input"]
    assert places(planned(net, rules={"*": INT8})) == ["a input"]


def test_computed_weights_are_calls():
    plain = conv()
    normed = nn.utils.parametrizations.weight_norm(conv())
    net = Net(lambda m, x: m.b(m.a(x)), a=plain, b=normed)
    plan = planned(net)
    assert places(plan, True) == [
        "a input", "a weight", "b/conv#0[0]", "b/conv#0[1]",
    ]  # fmt: skip
    assert plan.quantizers[-1].descriptor.axis == 0
    assert plan.counts == {"b": {"conv": 1}}


def test_subclasses_are_calls():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight=w)

    plan = planned(Net(lambda m, x: m.a(x), a=Standardized(16, 16, 1)))
    assert places(plan, True) == ["a/conv#0[0]", "a/conv#0[weight]"]


# Functional calls


class Functional(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.function = function

    def forward(self, x):
        return self.function(x, self.w)


FUNCTIONAL = {
    "conv2d": (lambda x, w: F.conv2d(x, w), (16, 16, 1, 1), IMAGE, "conv", "1", 0),
    "keywords": (
        lambda x, w: F.conv2d(weight=w, input=x), (16, 16, 1, 1), IMAGE, "conv", "weight", 0
    ),
    "groups": (
        lambda x, w: F.conv2d(x, w, groups=16), (16, 1, 3, 3), IMAGE, "conv", "1", 0
    ),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w), (16, 32, 1, 1), IMAGE, "conv_transpose", "1", 1
    ),
    "transposed groups": (
        lambda x, w: F.conv_transpose2d(x, w, groups=2),
        (16, 32, 1, 1), IMAGE, "conv_transpose", "1", None,
    ),
    "linear": (lambda x, w: F.linear(x, w), (24, 32), TOKENS, "linear", "1", 0),
    "slice": (lambda x, w: F.linear(x, w.chunk(2)[1]), (48, 32), TOKENS, "linear", "1", 0),
    "matmul": (lambda x, w: x @ w, (32, 24), TOKENS, "matmul", "1", 1),
    "transposed matmul": (lambda x, w: x @ w.t(), (24, 32), TOKENS, "matmul", "1", 1),
    "experts": (lambda x, w: x.transpose(0, 1) @ w, (20, 32, 24), TOKENS, "matmul", "1", 2),
    "addmm": (
        lambda x, w: torch.addmm(torch.zeros(24), x[0], w), (32, 24), TOKENS, "matmul", "2", 1
    ),
    "mat2": (lambda x, w: torch.mm(x[0], mat2=w), (32, 24), TOKENS, "matmul", "mat2", 1),
    "from the left": (lambda x, w: w @ x, (24, 20), TOKENS, "matmul", "0", None),
    "einsum": (
        lambda x, w: torch.einsum("btk,nk->btn", x, w), (24, 32), TOKENS, "einsum", "2", 0
    ),
    "einsum list": (
        lambda x, w: torch.einsum("btk,khd->bthd", [x, w]),
        (32, 4, 8), TOKENS, "einsum", "1.1", None,
    ),
    "einsum ellipsis": (
        lambda x, w: torch.einsum("...ij,...jk->...ik", x, w), (32, 24), TOKENS, "einsum", "2", 1
    ),
    "einsum without result": (
        lambda x, w: torch.einsum("bik, kj", x, w), (32, 24), TOKENS, "einsum", "2", 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_products(name):
    function, weight_shape, shape, op, operand, axis = FUNCTIONAL[name]
    plan = planned(Functional(function, *weight_shape), shape)
    by_place = {written(q.places[0]): q.descriptor.axis for q in plan.quantizers}
    assert by_place.pop(f"/{op}#0[{operand}]") == axis
    assert list(by_place.values()) == [None] and next(iter(by_place)).startswith(f"/{op}#0[")
    assert plan.counts == {"": {op: 1}}


def test_two_activations_are_both_quantized():
    net = Net(lambda m, x: torch.bmm(x, x.transpose(1, 2)))
    assert places(planned(net, TOKENS)) == ["/matmul#0[0] = /matmul#0[1]"]
    net = Net(lambda m, x: torch.einsum("nid,njd->nij", x, x[:, :16]))
    assert places(planned(net, TOKENS)) == ["/einsum#0[1]", "/einsum#0[2]"]


def test_what_is_no_matrix_product():
    net = Net(lambda m, x: torch.einsum("nld,nld->nl", x, x))
    assert "no plain product" in left(planned(net, TOKENS))["/einsum#0"]
    net = Net(lambda m, x: torch.einsum("...d,...d", x, x))
    assert "no plain product" in left(planned(net, TOKENS))["/einsum#0"]
    assert planned(Functional(lambda x, w: x * (w @ w), 32, 32), (32, 32)).quantizers == []


@pytest.mark.parametrize(
    ("equation", "shapes", "rule"),
    [
        ("bij,bjk->bik", ((20, 32), (32, 20)), None),
        ("...ij,...kj->...ik", ((1, 32), (20, 32)), "(H1)"),
        ("bij,bkj->bik", ((20, 32), (1, 32)), "(H1)"),
        ("...ij,...jk", ((20, 8), (8, 20)), "(H2)"),
        ("bij,bjk->bik", ((20, 32), (32, 8)), "(H2)"),
        ("...ij,...jk->...ik", ((2, 20, 32), (2, 32, 8)), "(H2)"),
    ],
)
def test_sizes_of_einsum(equation, shapes, rule):
    sizes = [torch.Size(shape).numel() for shape in shapes]

    def function(m, x):
        a, b = x.tanh().split(sizes, 1)
        return torch.einsum(equation, a.unflatten(1, shapes[0]), b.unflatten(1, shapes[1]))

    one, four = (planned(Net(function), (sum(sizes),), batch=n) for n in (1, 4))
    assert one == four
    assert len(one.quantizers) == (0 if rule else 2)
    assert [entry.reason[-4:] for entry in one.left] == ([rule] if rule else [])


@pytest.mark.parametrize(("length", "rule"), [(512, None), (513, "(H5)")])
def test_attention_of_einsums(length, rule):
    def function(m, x):
        q, k, v = x.tanh().unflatten(-1, (2, 48)).chunk(3, -1)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bkhd,bhqk->bqhd", v, scores)

    plan = planned(Net(function), (length, 96))
    assert len(plan.quantizers) == (0 if rule else 4)
    assert [entry.reason[-4:] for entry in plan.left] == ([rule] * 2 if rule else [])


# Attention


class HandAttention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fused = fused

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = (p.view(n, length, 2, 16).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * 0.25) @ k.transpose(-2, -1)
            scores = scores.masked_fill(torch.zeros(length, length, dtype=torch.bool), -9.0)
            y = F.dropout(scores.softmax(-1), training=False) @ v
        return self.proj(y.transpose(1, 2).reshape(n, length, 32))


def test_attention_by_hand():
    plan = planned(HandAttention(False), TOKENS)
    assert places(plan) == [
        "qkv input",
        "/matmul#0[0]",
        "/matmul#0[1]",
        "/matmul#1[0]",
        "/matmul#1[1]",
        "proj input",
    ]
    assert plan.counts == {"": {"matmul": 2}} and plan.left == []


def test_fused_attention():
    plan = planned(HandAttention(True), TOKENS)
    name = "/scaled_dot_product_attention#0"
    assert places(plan) == [
        "qkv input",
        *(f"{name}[{operand}]" for operand in (0, 1, 2, "probabilities")),
        "proj input",
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_long_and_short_sequences(fused):
    for length, rule in ((512, None), (513, "(H5)"), (15, "(H2)"), (1, "(H1)")):
        entries = left(planned(HandAttention(fused), (length, 32)))
        assert len(entries) == (0 if rule is None else 1 if fused else 2), entries
        assert all(rule in reason or length == 1 for reason in entries.values())
    rule = F.scaled_dot_product_attention if fused else torch.matmul
    assert left(planned(HandAttention(fused), (600, 32), {rule: INT8})) == {}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        y = self.ln1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


def test_a_transformer_block():
    plan = planned(Encoder(), TOKENS)
    attention = "attn/scaled_dot_product_attention#0"
    assert places(plan, weights=True) == [
        "attn/linear#0[0]",
        "attn/linear#0[1]",
        *(f"{attention}[{operand}]" for operand in (0, 1, 2, "probabilities")),
        "attn/linear#1[0]",
        "attn/linear#1[1]",
        "mlp.0 input",
        "mlp.0 weight",
        "mlp.2 input",
        "mlp.2 weight",
    ]
    assert set(left(plan)) == {"/add#0", "/add#1"}
    assert plan.counts == {"attn": {"linear": 2, "scaled_dot_product_attention": 1}}
    # The projection is called as a function; its own forward was not seen.
    assert plan.framed == ["attn.out_proj"]


def test_cross_attention_slices_its_weight():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x[:, :17], x[:, :17])[0]

    plan = planned(Cross(), TOKENS)
    weights = [q for q in plan.quantizers if q.descriptor.axis is not None]
    assert [written(q.places[0]) for q in weights] == [f"attn/linear#{k}[1]" for k in range(4)]
    assert plan.counts == {"attn": {"linear": 4, "matmul": 2}}


# Residual adds


def iadd(x, y):
    x += y
    return x


ADDS = {
    "x + y": lambda x, y: x + y,
    "x += y": iadd,
    "torch.add": torch.add,
    "x.add": lambda x, y: x.add(y),
    "x.add_": lambda x, y: x.add_(y),
    "operator.iadd": operator.iadd,
    "FloatFunctional": lambda x, y: torch.ao.nn.quantized.FloatFunctional().add(x, y),
}


@pytest.mark.parametrize("spelling", ADDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("identity_first", [False, True])
def test_an_identity_is_quantized_in_every_spelling(spelling, identity_first):
    add = ADDS[spelling]

    def forward(m, x):
        x = m.stem(x).relu()
        y = m.b(m.a(x).relu())
        return m.c((add(x, y) if identity_first else add(y, x)).relu())

    net = Net(forward, stem=conv_bn(), a=conv_bn(), b=conv_bn(), c=conv())
    side = 0 if identity_first else 1
    assert places(planned(net)) == [
        "stem.0 input",
        f"a.0 input = /add#0[{side}]",
        "b.0 input",
        "c input",
    ]


@pytest.mark.parametrize("projection_first", [False, True])
def test_a_projection_is_the_shorter_branch(projection_first):
    def forward(m, x):
        if projection_first:
            z = m.down(x)
            y = m.b(m.a(x).relu())
        else:
            y = m.b(m.a(x).relu())
            z = m.down(x)
        return m.c((y + z).relu())

    net = Net(forward, a=conv_bn(), b=conv_bn(), down=conv_bn(), c=conv())
    found = places(planned(net))
    assert "/add#0[1]" in found and not any("/add#0[0]" in p for p in found)


def test_of_two_equal_branches_the_first_is_quantized():
    net = Net(lambda m, x: m.a(x) + m.b(x), a=conv_bn(), b=conv_bn())
    assert places(planned(net)) == ["a.0 input = b.0 input", "/add#0[0]"]
    net = Net(lambda m, x: operator.add(*[m.b(x), m.a(x)][::-1]), a=conv_bn(), b=conv_bn())
    assert places(planned(net)) == ["b.0 input = a.0 input", "/add#0[1]"]


def test_an_inverted_residual_and_its_neighbour():
    """The identity is the output of the block before; one quantizer serves both its readers."""

    class Inverted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                conv_bn(16, 32), nn.ReLU6(), conv_bn(32, 32, 3, groups=32), nn.ReLU6(),
                conv_bn(32, 16),
            )  # fmt: skip

        def forward(self, x):
            return x + self.body(x)

    plan = planned(nn.Sequential(Inverted(), Inverted()))
    assert places(plan) == [
        "0.body.0.0 input = 0/add#0[0]",
        "0.body.2.0 input",
        "0.body.4.0 input",
        "1.body.0.0 input = 1/add#0[0]",
        "1.body.2.0 input",
        "1.body.4.0 input",
    ]
    assert plan.counts == {"0": {"add": 1}, "1": {"add": 1}}


def test_layer_scale_and_constants_stay_in_the_branch():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gamma = conv(), nn.Parameter(torch.ones(16, 1, 1))

        def forward(self, x):
            return x + F.dropout(self.gamma * (self.a(x) + 1), training=False)

    # add#0 adds a constant.
    assert places(planned(Scaled())) == ["a input = /add#1[0]"]


def other_adds(m, x):
    y = m.a(x)
    z = y + 1 + m.bias
    return m.b(z.relu()).sigmoid() + x, y + y.mean((2, 3), keepdim=True), x[:, :, :1] + m.a(x)


def test_adds_without_quantizers():
    net = Net(other_adds, a=conv(), b=conv())
    net.bias = nn.Parameter(torch.ones(16, 1, 1))
    plan = planned(net)
    assert not any("add" in p for p in places(plan))
    reasons = left(plan)
    assert sorted(reasons) == ["/add#2", "/add#3", "/add#4", "/mean#0"]
    assert all("(L8)" in reasons[site] for site in reasons)


def test_a_convolution_with_two_readers_is_not_fused():
    net = Net(lambda m, x: (lambda y: (x + y, y))(m.a(x)), a=conv())
    plan = planned(net)
    assert places(plan) == ["a input"] and "(L4)" in left(plan)["/add#0"]


def test_a_float_convolution_has_no_residual_quantizer():
    net = Net(lambda m, x: x + m.a(x), a=conv())
    assert places(planned(net, rules={"a": None})) == []
    assert places(planned(net, rules={"a": None, "/add#0": INT8})) == ["/add#0[0]", "/add#0[1]"]
    assert places(planned(net, rules={"/add#0": None})) == ["a input"]


# Concatenations


def test_inception():
    def forward(m, x):
        x = m.stem(x).relu()
        y = torch.cat([m.a(x).relu(), m.b(x).relu(), m.c(F.max_pool2d(x, 3, 1, 1)).relu()], 1)
        return m.d(F.max_pool2d(y, 2))

    net = Net(forward, stem=conv(), a=conv(), b=conv(), c=conv(), d=conv(48, 16))
    plan = planned(net)
    assert places(plan) == [
        "stem input",
        "a input = b input",
        "c input",
        "/cat#0[0.0] = /cat#0[0.1] = /cat#0[0.2] = d input",
    ]
    assert plan.counts == {"": {"cat": 1}}


def test_a_dense_block_has_no_quantizer_at_its_concatenations():
    def forward(m, x):
        y = torch.cat([x, m.a(m.n1(x).relu())], 1)
        return m.b(m.n2(y).relu())

    net = Net(forward, n1=nn.BatchNorm2d(16), a=conv(), n2=nn.BatchNorm2d(32), b=conv(32))
    plan = planned(net)
    assert places(plan) == ["a input", "b input"]
    assert "(L6)" in left(plan)["/cat#0"]


def test_a_shuffle_is_one_scale_from_concatenation_to_concatenation():
    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()

        def forward(self, x):
            one, two = x.chunk(2, 1)
            y = torch.cat((one, self.a(two).relu()), 1)
            n, c, h, w = y.shape
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    net = nn.Sequential(Shuffle(), Shuffle(), conv(32, 16))
    assert places(planned(net, (32, 8, 8))) == [
        # What enters the first block is another tensor.
        "0.a input",
        "0/cat#0[0.0] = 0/cat#0[0.1] = 1.a input = 1/cat#0[0.0] = 1/cat#0[0.1] = 2 input",
    ]


def test_a_skip_connection_shares_with_its_other_reader():
    def forward(m, x):
        skip = m.a(x).relu()
        deep = m.b(F.max_pool2d(skip, 2)).relu()
        up = m.c(torch.cat([skip, F.interpolate(deep, scale_factor=2)], 1))
        return up + m.d(skip).sum()

    net = Net(forward, a=conv(), b=conv(), c=conv(32), d=conv())
    assert places(planned(net)) == [
        "a input",
        "b input",
        "/cat#0[0.0] = /cat#0[0.1] = c input = d input",
    ]


def test_a_concatenation_that_leaves_the_model_is_float():
    net = Net(lambda m, x: {"y": torch.cat([m.a(x), x], 1)}, a=conv())
    plan = planned(net)
    assert places(plan) == ["a input"] and "(L6)" in left(plan)["/cat#0"]
    assert places(planned(net, rules={torch.cat: INT8})) == ["a input = /cat#0[0.0] = /cat#0[0.1]"]


def test_a_float_reader_keeps_a_concatenation_float():
    net = Net(
        lambda m, x: (lambda y: m.b(y) + y.tanh().mean())(torch.cat([m.a(x), x], 1)),
        a=conv(),
        b=conv(32),
    )
    assert places(planned(net)) == ["a input", "b input"]


# Average pooling

POOLS = {
    "layer": (lambda m, x: m.pool(x), "pool input"),
    "functional": (lambda m, x: F.adaptive_avg_pool2d(x, 1), "/adaptive_avg_pool#0[0]"),
    "mean": (lambda m, x: x.mean((2, 3)), "/mean#0[0]"),
    "negative": (lambda m, x: x.mean([-1, -2], keepdim=True), "/mean#0[0]"),
    "keyword": (lambda m, x: torch.mean(x, dim=(3, 2)), "/mean#0[0]"),
}


@pytest.mark.parametrize("name", POOLS)
def test_the_head_of_a_classifier(name):
    pool, place = POOLS[name]
    net = Net(
        lambda m, x: m.fc(pool(m, m.a(x).relu()).flatten(1)),
        a=conv(), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(16, 20),
    )  # fmt: skip
    plan = planned(net)
    assert places(plan) == ["a input", place, "fc input"]
    # A classifier with few classes stays float (H2), and its pooling with it (L8).
    net.fc = nn.Linear(16, 10)
    assert places(planned(net)) == ["a input"]


def test_means_that_are_no_pooling():
    net = Net(lambda m, x: (m.fc(x.mean(1)), m.fc(x.mean((0, 1)))), fc=nn.Linear(32, 32))
    assert places(planned(net, TOKENS)) == ["fc input"]


def test_an_average_before_a_convolution():
    net = Net(lambda m, x: m.a(x) + m.b(F.avg_pool2d(x, 3, 1, 1)).sum(), a=conv(), b=conv())
    assert places(planned(net)) == ["a input = /avg_pool#0[0]", "b input"]


def test_a_product_that_is_quantized_again():
    """Squeeze and excitation: the map is one tensor, pooled and scaled."""
    net = Net(
        lambda m, x: (lambda y: m.c(y * m.b(y.mean((2, 3), keepdim=True)).sigmoid()))(m.a(x)),
        a=conv(), b=conv(), c=conv(),
    )  # fmt: skip
    assert places(planned(net)) == [
        "a input",
        "/mean#0[0] = /mul#0[0]",
        "b input",
        "/mul#0[1]",
        "c input",
    ]
    net = Net(lambda m, x: m.a(x) * m.b(x), a=conv(), b=conv())
    assert places(planned(net)) == ["a input = b input"]
    assert "returns it" in left(planned(net))["/mul#0"]


def test_a_sum_that_is_quantized_again():
    """With SiLU between them, no convolution can be fused with the add."""
    net = Net(lambda m, x: m.b(F.silu(x) + F.silu(m.a(x))), a=conv(), b=conv())
    plan = planned(net)
    assert places(plan) == ["a input", "/add#0[0]", "/add#0[1]", "b input"]
    assert not plan.left


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sigmoid(),
        lambda x: F.relu6(x + 3) / 6 * x,
        lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        lambda x: x * x,
    ],
)
def test_an_activation_written_out_is_no_pair(function):
    net = Net(lambda m, x: m.b(function(m.a(x))), a=conv(), b=conv())
    assert places(planned(net)) == ["a input", "b input"]


# Modules that run several times, and where calls are counted


def test_a_block_that_runs_twice():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv_bn()

        def forward(self, x):
            return (x + self.a(x)).relu()

    net = Net(lambda m, x: m.block(m.block(x)), block=Block())
    plan = planned(net)
    assert places(plan) == ["block.a.0 input = block/add#0[0]"]
    assert plan.counts == {"block": {"add": 1}}


def test_runs_that_disagree_stay_float():
    class Block(nn.Module):
        def forward(self, x, y, more):
            return x + y + y if more else x + y

    net = Net(
        lambda m, x: m.block(x, m.a(x), False) + m.block(x, m.b(x), True).sum(),
        block=Block(), a=conv(), b=conv(),
    )  # fmt: skip
    plan = planned(net)
    assert places(plan) == ["a input = b input"]
    assert "each of its runs" in left(plan)["block/add#0"]
    # As many calls in each run, but only one of the runs adds a convolution.
    net = Net(
        lambda m, x: m.block(x, m.a(x), False) + m.block(x, x.tanh(), False).sum(),
        block=Block(), a=conv(),
    )  # fmt: skip
    plan = planned(net)
    assert places(plan) == ["a input"] and "not every run" in left(plan)["block/add#0"]


def test_modules_inside_of_a_counted_one_are_framed():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()

        def forward(self, x):
            return self.a(x) + 1

    net = Net(lambda m, x: m.sub(x) + x, sub=Scale(), act=nn.ReLU(), idle=Scale())
    plan = planned(net)
    assert plan.counts == {"": {"add": 1}}
    # `act` and `idle` did not run; `sub.a` ran and makes no call of the kind.
    assert plan.framed == ["sub", "act", "idle", "idle.a"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_children_are_left():
    net = Net(lambda m, x: m.b(m.a(x)), a=torch.jit.script(conv()), b=conv())
    plan = planned(net)
    assert places(plan) == ["b input"]
    assert "scripted" in left(plan)["a/script#0"]


def test_what_is_quantized_already_stays_as_it_is():
    with quantized_modules():
        net = Net(lambda m, x: m.b((x + m.a(x)).relu()), a=nn.Conv2d(16, 16, 1), b=nn.Linear(8, 16))
    assert places(planned(net), weights=True) == ["/add#0[0]"]


# Rules and schemes


def test_a_scheme_without_a_rule_of_its_own_follows_the_convolution():
    net = Net(lambda m, x: m.b(x + m.a(x)), a=conv(32, 32), b=conv(32, 32))
    plan = planned(net, (32, 8, 8), {nn.Conv2d: FP8})
    assert {q.descriptor for q in plan.quantizers} == {QuantDescriptor((4, 3))}
    assert places(plan) == ["a input = /add#0[0]", "b input"]


def test_readers_that_quantize_differently():
    net = Net(lambda m, x: m.a(x) + m.b(x).sum(), a=conv(32, 32), b=conv(32, 32))
    plan = planned(net, (32, 8, 8), {"b": FP8})
    assert places(plan) == ["a input", "b input"]


def test_rules_reach_functions_and_attention():
    plan = planned(Encoder(), TOKENS, {nn.MultiheadAttention: None})
    assert places(plan) == ["mlp.0 input", "mlp.2 input"]
    assert left(plan)["attn/linear#0"] == "a rule"
    plan = planned(Encoder(), TOKENS, {"*/scaled*": None})
    assert not any("scaled" in place for place in places(plan))
    assert left(plan)["attn/scaled_dot_product_attention#0"] == "a rule"


def test_weights_alone():
    net = Net(lambda m, x: m.fc(x), fc=nn.Linear(128, 64))
    plan = planned(net, (4, 128), {nn.Linear: INT4_WEIGHT_ONLY})
    assert places(plan, weights=True) == ["fc weight"]
    plan = planned(Functional(operator.matmul, 128, 64), (4, 128), {"*": INT4_WEIGHT_ONLY})
    assert [(q.descriptor.axis, q.descriptor.block_size) for q in plan.quantizers] == [(0, 64)]


PER_CHANNEL = Scheme("PC", QuantDescriptor(8, axis=1), QuantDescriptor(8))
CODES = Scheme("CODES", QuantDescriptor(8, fake_quant=False), QuantDescriptor(8))
UNSIGNED = Scheme("UNSIGNED", QuantDescriptor(8, unsigned=True), QuantDescriptor(8))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"a": PER_CHANNEL}, r"^a: scheme PC.*\(W4\)"),
        ({"a": INT4_WEIGHT_ONLY}, r"^a: scheme INT4_WEIGHT_ONLY.*\(F5\)"),
        ({"fc": INT4_WEIGHT_ONLY}, r"^fc: .*blocks of 64.*its 32 inputs"),
        ({"fc": INT8_DYNAMIC}, r"^fc: .*\(R12\)"),
        ({"fc": CODES}, r"^fc: .*integer codes"),
        ({"fc": UNSIGNED}, r"^fc: .*\(R6\)"),
        ({"/add#0": PER_CHANNEL}, r"^/add#0: scheme PC"),
        ({"b": PER_CHANNEL}, r"^b: scheme PC"),
        ({"c": INT8}, r"'c': no module"),
    ],
)
def test_schemes_that_do_not_fit(rules, message):
    net = Net(lambda m, x: m.fc(x + m.a(x)), a=conv(), fc=nn.Linear(32, 32), b=conv())
    with pytest.raises(ValueError, match=message):
        planned(net, (16, 32, 32), rules)


def test_dynamic_activations_elsewhere():
    net = Net(lambda m, x: m.fc(x) @ m.fc(x).transpose(1, 2), fc=nn.Linear(32, 32))
    plan = planned(net, TOKENS, {"*": INT8_DYNAMIC}, "onnxruntime")
    assert places(plan) == ["fc input", "/matmul#0[0]", "/matmul#0[1]"]
    assert all(q.descriptor.dynamic for q in plan.quantizers if q.places[0].operand != ("weight",))


def test_wrong_use():
    net = Net(lambda m, x: m.a(x), a=conv())
    with pytest.raises(ValueError, match=r"unknown placement 'trt'\. Valid: none, tensorrt"):
        make_plan(net, None, None, "trt")
    with pytest.raises(ValueError, match="give example inputs, or use placement='none'"):
        make_plan(net, None, None, "tensorrt")
    with pytest.raises(TypeError, match="must be a mapping"):
        make_plan(net, None, [], "none")


def test_a_type_that_the_model_lacks_is_reported():
    net = Net(lambda m, x: m.a(x), a=conv())
    for placement in ("tensorrt", "none"):
        entries = planned(net, rules={nn.Conv3d: None}, placement=placement).left
        assert [(e.site, e.op) for e in entries] == [("Conv3d", "rule")]


# Other placements


def test_none_is_what_a_patch_builds():
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 3, 1), nn.ReLU(), nn.AvgPool2d(2), nn.MaxPool2d(2),
            nn.MultiheadAttention(4, 2), nn.LSTM(4, 4), nn.GRU(4, 4), nn.Linear(4, 1),
        )  # fmt: skip

    assert places(make_plan(build(), None, None, "none"), weights=True) == [
        "0 input", "0 weight", "2 input", "5 input", "5 weight", "7 input", "7 weight",
    ]  # fmt: skip
    plan = make_plan(build(), None, {"0": None, "3": INT8, nn.Linear: INT8_PER_TENSOR}, "none")
    assert places(plan) == ["2 input", "3 input", "5 input", "7 input"]
    assert {e.site for e in plan.left} == {"0", "6"}
    with pytest.raises(ValueError, match="Calls are known only"):
        make_plan(build(), None, {"/add#0": None}, "none")


def test_an_add_for_onnxruntime_has_quantizers_on_all_sides():
    net = Net(
        lambda m, x: m.c(((y := m.s(x).relu()) + m.a(y)).relu()).tanh(),
        s=conv_bn(), a=conv_bn(), c=conv(),
    )  # fmt: skip
    for placement in ("onnxruntime", "openvino"):
        plan = planned(net, placement=placement)
        assert places(plan) == [
            "s.0 input",
            "a.0 input = /add#0[0]",
            "/add#0[1]",
            "c input",
            "c/conv#0[result]",
        ]
        unsigned = [q.places[0].site for q in plan.quantizers if q.descriptor.unsigned]
        assert unsigned == ["a.0", "c"]


def test_an_output_is_quantized_after_what_is_fused():
    net = Net(lambda m, x: F.silu(m.r(m.a(x))), a=conv_bn(), r=nn.ReLU6())
    plan = planned(net, placement="onnxruntime")
    assert places(plan) == ["a.0 input", "r/clamp#0[result]"]
    assert plan.quantizers[-1].descriptor.unsigned
    assert plan.counts == {"r": {"clamp": 1}}
    net = Net(lambda m, x: F.silu(m.a(x)), a=conv_bn())
    assert places(planned(net, placement="onnxruntime")) == [
        "a.0 input",
        "a.1/batch_norm#0[result]",
    ]
    assert not planned(net, placement="onnxruntime").quantizers[-1].descriptor.unsigned


def test_a_tensor_that_is_quantized_where_it_is_made_is_quantized_once():
    net = Net(lambda m, x: (lambda y: m.b(y) * y.exp())(m.a(x).relu()), a=conv(), b=conv())
    plan = planned(net, placement="onnxruntime")
    assert places(plan) == ["a input", "/relu#0[result]", "b/conv#0[result]"]


def test_unsigned_through_concatenation_and_pooling():
    def forward(m, x):
        y = torch.cat([m.a(x).relu(), F.max_pool2d(m.b(x).sigmoid(), 3, 1, 1)], 1)
        z = torch.cat([m.c(y).relu(), m.c(y)], 1)
        return m.fc(m.d(z).relu().mean((2, 3)))

    net = Net(forward, a=conv(), b=conv(), c=conv(32), d=conv(32), fc=nn.Linear(16, 16))
    plan = planned(net, placement="onnxruntime")
    signs = {" ".join(map(written, q.places)): q.descriptor.unsigned for q in plan.quantizers}
    weights = [name for name in signs if name.endswith("weight")]
    assert not any(signs.pop(name) for name in weights)
    assert signs == {
        "a input b input": False,
        "b/conv#0[result]": False,
        "/cat#0[0.0] /cat#0[0.1] c input": True,
        "/cat#1[0.0] /cat#1[0.1] d input": False,
        "/mean#0[0]": True,
        "fc input": True,
    }


@pytest.mark.parametrize(
    ("function", "unsigned"),
    [
        (lambda y: torch.add(y.relu(), y.relu(), alpha=-1), False),
        (lambda y: torch.add(y.relu(), y.relu(), alpha=2), True),
        (lambda y: torch.add(F.relu(y), other=-3), False),
        (lambda y: F.relu(y).add_(3), True),
        (lambda y: F.relu(y) + -3, False),
        (lambda y: F.relu6(y), True),
        (lambda y: F.relu6(y, inplace=True), True),
        (lambda y: F.hardtanh(y), False),
        (lambda y: y.clamp(0, -1), False),
        (lambda y: y.clamp(min=0), True),
        (lambda y: y.clamp_max(3), False),
    ],
)
def test_signs_of_functions(function, unsigned):
    net = Net(lambda m, x: m.b(function(m.a(x))), a=conv(), b=conv())
    plan = planned(net, placement="onnxruntime")
    (found,) = (q for q in plan.quantizers if any(written(p) == "b input" for p in q.places))
    assert found.descriptor.unsigned is unsigned


def test_no_convolution_is_left_float_for_onnxruntime():
    net = Net(lambda m, x: m.fc(m.a(x).relu()), a=conv(16, 5, 3), fc=nn.Linear(8, 1))
    plan = planned(net, placement="onnxruntime")
    assert places(plan) == ["a input", "fc input"] and plan.left == []


# The table


def test_the_table_names_everything():
    net = Net(lambda m, x: m.b((x + m.a(x)).relu()), a=conv(), b=nn.Conv2d(16, 3, (1, 2)))
    text = str(planned(net, rules={"a": INT8_PER_TENSOR}))
    lines = text.splitlines()
    assert lines[0] == "placement tensorrt: 2 quantizers"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["a", "/add#0", "a"]
    assert "argument 0" in text and "shared with a input" in text
    assert "left float: 1" in text and lines[-1].startswith("b ") and "(H3)" in text
    assert not any(line != line.rstrip() for line in lines)
    dynamic = planned(net, rules={"*": INT8_DYNAMIC}, placement="onnxruntime")
    assert "int8 dynamic" in str(dynamic)
    assert "float E4M3 per tensor" in str(planned(net, rules={"a": FP8}))


def test_input_order_of_the_table_is_that_of_the_run():
    net = Net(lambda m, x: m.a(m.b(x)), a=conv(), b=conv())
    assert [q.places[0].module for q in planned(net).quantizers] == ["b", "b", "a", "a"]


# Cases at the edges


def test_a_type_rule_reaches_the_model_itself():
    net = nn.Sequential(conv(), nn.ReLU(), conv())
    assert planned(net, rules={nn.Sequential: None}).quantizers == []
    assert planned(net, rules={"": None}).quantizers == []
    assert places(planned(net, rules={"": None, "2": INT8})) == ["2 input"]
    assert planned(conv(), rules={"": None}).quantizers == []


def test_a_shared_module_has_all_its_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    for key in ("a", "b", "b*"):
        assert planned(Twice(), rules={key: None}).quantizers == []
        assert len(planned(Twice(), rules={key: INT8_PER_TENSOR}).quantizers) == 2


def test_a_function_with_dimensions_means_its_own():
    net = Net(
        lambda m, x: F.conv2d(m.b(m.a(x.flatten(2)).unflatten(2, (8, 8))), m.w),
        a=nn.Conv1d(16, 16, 1), b=conv(),
    )  # fmt: skip
    net.w = nn.Parameter(torch.randn(16, 16, 1, 1))
    assert places(planned(net, rules={F.conv1d: None})) == [
        "b input", "/conv#0[0]", "/conv#0[1]"
    ]  # fmt: skip
    assert places(planned(net, rules={torch.conv2d: None})) == ["a input"]
    assert planned(net, rules={torch.ops.aten.convolution: None}).quantizers == []
    assert [e.site for e in planned(net, rules={F.conv3d: None}).left] == ["conv3d"]


def test_a_sum_that_no_convolution_is_fused_with_is_a_pair():
    net = Net(
        lambda m, x: (lambda y: m.b((y + x.tanh()).relu()) + y.exp())(m.a(x)), a=conv(), b=conv()
    )
    assert "/add#0[0]" in places(planned(net))


def test_a_result_that_is_also_returned_stays_float():
    net = Net(lambda m, x: (lambda y: (m.b(y), y))(torch.cat([m.a(x), x], 1)), a=conv(), b=conv(32))
    plan = planned(net)
    assert places(plan) == ["a input", "b input"] and "(L6)" in left(plan)["/cat#0"]


def test_a_product_over_the_batch_is_not_judged_by_its_size():
    net = Net(lambda m, x: m.fc(x) @ m.fc(x).t(), fc=nn.Linear(32, 32))
    one, eight = (planned(net, (32,), batch=batch) for batch in (1, 8))
    assert one == eight and one.left == []


def test_a_layer_whose_weight_is_called_elsewhere_is_a_call():
    net = Net(lambda m, x: F.linear(x, m.head.weight), head=nn.Linear(32, 32))
    plan = planned(net, TOKENS)
    assert places(plan, weights=True) == ["/linear#0[0]", "/linear#0[1]"]


def test_a_layer_with_a_forward_of_its_own_is_a_call():
    net = Net(lambda m, x: m.a(x), a=conv())
    net.a.forward = lambda x: F.conv2d(x.relu(), net.a.weight)
    assert places(planned(net), weights=True) == ["a/conv#0[0]", "a/conv#0[1]"]


@pytest.mark.parametrize(
    ("between", "same"),
    [
        (lambda y: F.pad(y, (1, 1)), True),
        (lambda y: F.pad(y, (1, 1), value=1.0), False),
        (lambda y: F.interpolate(y, scale_factor=2), True),
        (lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"), False),
        (lambda y: y.to(torch.float32), True),
        (lambda y: y.half().float(), False),
        (lambda y: F.relu(y), True),
        (lambda y: F.relu6(y), False),
        (lambda y: F.avg_pool2d(y, 1), True),
    ],
)
def test_what_keeps_the_grid_of_a_concatenation(between, same):
    net = Net(lambda m, x: m.b(between(torch.cat([m.a(x), x], 1))), a=conv(), b=conv(32))
    plan = planned(net)
    assert any("cat" in place for place in places(plan)) is same
    assert ("/cat#0" in left(plan)) is not same


def test_a_module_from_elsewhere_is_framed():
    class Block(nn.Module):
        def __init__(self, others):
            super().__init__()
            self.a, self.others = conv(), others

        def forward(self, x):
            y = x * 1
            x = self.others[0](x + self.a(x))
            return x * y + (x + 1)

    class Shift(nn.Module):
        def forward(self, x):
            return x + 1

    shift = Shift()
    plan = planned(Net(lambda m, x: m.block(x), block=Block([shift]), shift=shift))
    assert plan.counts == {"block": {"add": 3}} and plan.framed == ["shift"]


def test_operands_that_pass_a_quantizer_already_get_no_other():
    net = Net(lambda m, x: m.q(x) + m.a(x.relu()), a=conv(), q=TensorQuantizer())
    assert places(planned(net)) == ["a input"]
    net.q = nn.Identity()
    assert places(planned(net)) == ["a input", "/add#0[0]"]
