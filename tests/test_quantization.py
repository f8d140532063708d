"""`quantize` and `placement_plan`: what they check, and what they hand to planner and apply."""

import pytest
import torch
from torch import nn

from pytorch_quant import quantization
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn import QuantLinear, TensorQuantizer
from pytorch_quant.placement.plan import Place, Plan, PlannedQuantizer
from pytorch_quant.quantization import placement_plan, quantize

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) + x


@pytest.fixture
def planner(monkeypatch):
    """A planner that quantizes the input of the layer, and with a flow the addition."""
    asked = []

    def make_plan(model, flow, rules, placement):
        asked.append((model, flow, rules, placement))
        desc = QuantDescriptor(8, amax=1.0)
        layer = PlannedQuantizer(desc, (Place("layer", None, ("input",)),), "linear", "a test")
        plan = Plan(placement, [layer])
        if flow is not None:
            sites = {call.site: call for call in flow.calls}
            assert "/add#0" in sites
            plan.quantizers.append(
                PlannedQuantizer(desc, (Place("", "add#0", (1,)),), "add", "a test")
            )
            plan.counts[""] = {"add": 1}
        return plan

    monkeypatch.setattr(quantization, "make_plan", make_plan)
    return asked


def test_in_place_with_example_inputs(planner):
    model, rules = Net().train(), {"layer": None}
    layer, weight = model.layer, model.layer.weight
    assert quantize(model, rules, example_inputs=X, placement="openvino") is model
    ((asked, _, given, placement),) = planner
    assert (asked, given, placement) == (model, rules, "openvino")
    assert model.layer is layer and layer.weight is weight and isinstance(layer, QuantLinear)
    assert isinstance(model._call_quantizers.add_0_input1, TensorQuantizer)
    assert model.training


def test_layers_alone_need_no_inputs(planner):
    model = quantize(Net(), placement="none")
    assert planner[0][1:] == (None, None, "none")
    assert isinstance(model.layer, QuantLinear) and not hasattr(model, "_call_quantizers")


def test_a_plan_edits_nothing(planner):
    model = Net()
    plan = placement_plan(model, X)
    assert planner[0][3] == "tensorrt" and len(plan.quantizers) == 2
    assert type(model) is Net and type(model.layer) is nn.Linear
    assert placement_plan(model, None, placement="none").counts == {}


def test_a_second_time_changes_nothing_and_says_so(planner):
    model = quantize(Net(), example_inputs=X)
    state = [(m, type(m), list(m._modules)) for m in model.modules()]
    with pytest.warns(UserWarning, match="holds 3 quantizers already and is left unchanged") as w:
        assert quantize(model, example_inputs=X) is model
    assert w[0].filename == __file__
    assert [(m, type(m), list(m._modules)) for m in model.modules()] == state
    assert len(planner) == 1


def test_errors_of_the_model_pass_and_leave_it(planner):
    class Fails(Net):
        def forward(self, x):
            raise KeyError("my own")

    model = Fails()
    for _ in range(2):
        with pytest.raises(KeyError, match="my own"):
            quantize(model, example_inputs=X)
    assert type(model) is Fails and type(model.layer) is nn.Linear and not planner
    assert quantize(Net(), example_inputs=X)


def test_a_forward_that_quantizes_itself(planner):
    class Itself(Net):
        def forward(self, x):
            quantize(self, placement="none")
            return super().forward(x)

    with pytest.raises(RuntimeError, match=r"Itself: quantize was called in a forward pass"):
        quantize(Itself(), example_inputs=X)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.LazyLinear(3)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("function", [quantize, lambda m, **k: placement_plan(m, **k)])
def test_models_that_cannot_be_quantized(function):
    program = torch.export.export(Net(), (X,))
    cases = [
        (lambda x: x, TypeError, "takes a module, got function"),
        (program, TypeError, "exported by torch.export.*quantize the module that it was made of"),
        (program.module(), TypeError, "exported by torch.export.*then export that"),
        (torch.jit.trace(Net(), X), TypeError, "scripted or traced model has no Python forward"),
        (torch.compile(Net()), RuntimeError, r"quantize the original \(model._orig_mod\)"),
        (Net().to("meta"), RuntimeError, "layer.weight is on the meta device"),
        (Lazy(), RuntimeError, "a.weight has no shape yet"),
    ]
    for model, error, message in cases:
        with pytest.raises(error, match=message):
            function(model, example_inputs=X)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("tensort", "unknown placement 'tensort'; did you mean 'tensorrt'? Valid: none, "),
        ("zzz", r"unknown placement 'zzz'\. Valid"),
        (None, "unknown placement None"),
    ],
)
def test_placements_have_names(placement, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        quantize(Net(), example_inputs=X, placement=placement)


def test_a_placement_needs_inputs():
    with pytest.raises(ValueError, match="placement='tensorrt' has to see one forward pass; pass"):
        quantize(Net())
    with pytest.raises(ValueError, match="has to see one forward pass"):
        placement_plan(Net(), None)


def test_a_model_without_anything_to_quantize():
    with pytest.raises(ValueError, match="nothing to quantize in ReLU: no convolutions"):
        quantize(nn.ReLU(), example_inputs=torch.randn(2, 3))
    with pytest.raises(ValueError, match="in LSTM without rules: LSTM: a recurrent layer; "):
        quantize(nn.LSTM(4, 4), example_inputs=torch.randn(1, 3, 4))


def test_rules_may_leave_everything_float():
    model = nn.Sequential(nn.Linear(3, 3))
    assert quantize(model, {"*": None}, placement="none") is model
    assert type(model[0]) is nn.Linear
