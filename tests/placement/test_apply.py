"""A plan is carried out as a whole or not at all."""

import pytest
import torch
from hand_plans import Function, fq, place, plan, planned, quantized, rand
from torch import nn
from torch.nn import functional as F

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn import QuantConv2d, QuantLinear, TensorQuantizer
from pytorch_quant.placement.apply import apply_plan
from pytorch_quant.placement.plan import PlannedQuantizer

X = rand(2, 6)


class Net(nn.Module):
    """Two layers with one weight, a sum, and a head that runs in training alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.head = nn.Sequential(nn.Linear(6, 6), Function(lambda x: x + x))

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return (y, self.head(y)) if self.training else y


def state(model):
    """Everything that carrying out a plan could change."""
    return [
        (module, type(module), dict(module.__dict__), dict(module._modules))
        for module in model.modules()
    ]


SUM = planned(place("add#0", 1))
COUNTS = {"": {"add": 1}}


def shared():
    return planned(
        place(None, "input", module="a"), place(None, "input", module="b"), place("add#0", 1)
    )


def test_a_shared_quantizer_is_one_module():
    model = apply_plan(Net().eval(), plan(shared(), counts=COUNTS))
    assert type(model.a) is not nn.Linear and isinstance(model.a, QuantLinear)
    held = model._call_quantizers.add_0_input1
    assert model.a._input_quantizer is model.b._input_quantizer is held
    assert model.a.weight is model.b.weight
    assert model.a._weight_quantizer.disabled
    a, b = (F.linear(fq(X), layer.weight, layer.bias) for layer in (model.a, model.b))
    torch.testing.assert_close(model(X), a + fq(b))


def test_modules_that_the_recorded_pass_did_not_reach_do_not_count():
    model = apply_plan(Net(), plan(SUM, counts=COUNTS))
    y, head = model.train()(X)
    assert head.shape == y.shape == model.eval()(X).shape


def test_a_layer_that_is_quantized_already_keeps_its_quantizer():
    model = Net().eval()
    model.a = QuantLinear(6, 6)
    held = model.a._input_quantizer
    apply_plan(model, plan(shared(), counts=COUNTS))
    assert model.a._input_quantizer is held is model.b._input_quantizer
    assert model._call_quantizers.add_0_input1 is held


def test_quantizers_are_made_where_their_module_is(device):
    model = apply_plan(Net().to(device), plan(shared(), counts=COUNTS))
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    assert len(quantizers) == 3
    assert all(q._place.device.type == device.type for q in quantizers)
    assert model.eval()(X.to(device)).device.type == device.type


WRONG = {
    "no module": (plan(planned(place("add#0", 1, module="z")), counts=COUNTS), "no module 'z'"),
    "no counts": (plan(SUM), "/add#0: the plan counts 0 calls of 'add' there"),
    "counts elsewhere": (plan(SUM, counts={"z": {"add": 1}}), "a module 'z', which the model"),
    "too few counted": (plan(planned(place("add#1", 1)), counts=COUNTS), "counts 1 calls of 'add'"),
    "no number": (plan(planned(place("add", 1)), counts=COUNTS), "/add: a place in a call is such"),
    "twice": (plan(SUM, SUM, counts=COUNTS), r"/add#0: \(1,\) gets two quantizers"),
    "no form": (plan(planned(place(None, "input", module="head"))), "head: Sequential has no quan"),
    "no operand": (plan(planned(place(None, 1, module="a"))), r"a: Linear has no operand \(1,\)"),
    "no place": (
        plan(PlannedQuantizer(QuantDescriptor(8), (), "add", "")),
        "'add' without a place",
    ),
    "codes": (
        plan(
            PlannedQuantizer(QuantDescriptor(8, fake_quant=False), SUM.places, "add", ""),
            counts=COUNTS,
        ),
        "/add#0: a descriptor with fake_quant=False",
    ),
    "codes of a layer": (
        plan(
            shared(),
            PlannedQuantizer(
                QuantDescriptor(8, fake_quant=False),
                (place(None, "weight", module="b"),),
                "linear",
                "",
            ),
            counts=COUNTS,
        ),
        "Only fake quantization is supported",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_that_does_not_fit_changes_nothing(case):
    wrong, message = WRONG[case]
    model = Net().eval()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply_plan(model, wrong)
    assert state(model) == before
    assert torch.equal(model(X), F.linear(X, model.a.weight, model.a.bias) + model.b(X))


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    model = Net()
    before = state(model)

    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pytorch_quant.placement.apply.framed_class", fails)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(model, plan(shared(), counts=COUNTS))
    assert state(model) == before


def test_recurrent_layers_share_with_nobody():
    model = nn.Sequential(nn.LSTM(3, 3, 2), nn.Linear(3, 3))
    places = place(None, "input", module="0"), place(None, "input", module="1")
    with pytest.raises(ValueError, match="0: the layers and directions of LSTM have quantizers of"):
        apply_plan(model, plan(planned(*places)))
    apply_plan(model, plan(planned(places[0])))
    assert len(model[0]._input_quantizers) == 2


def test_frames_are_put_where_they_matter():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Net())
    layer = planned(place(None, "input", module="0"))
    apply_plan(model, plan(layer, planned(place("add#0", 1, module="2")), counts={"2": {"add": 1}}))
    assert type(model[0]) is QuantConv2d and type(model[1]) is nn.ReLU
    assert type(model) is nn.Sequential and type(model[2]) is not Net
    assert type(model[2].head) is nn.Sequential and type(model[2].head[1]) is not Function


def test_a_scripted_module_inside_is_left_alone():
    model = quantized(
        nn.Sequential(torch.jit.trace(nn.Linear(6, 6), X)).append(Function(lambda x: x + x)),
    )
    assert model(X).shape == X.shape
