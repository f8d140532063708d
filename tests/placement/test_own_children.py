"""A forward that goes through its children does not meet the quantizers of its calls."""

import pytest
import torch
from hand_plans import place, plan, planned, rand
from torch import nn

from pytorch_quant.nn import TensorQuantizer
from pytorch_quant.placement.apply import apply_plan


class Dense(nn.ModuleDict):
    def forward(self, x):
        features = [x]
        for _, layer in self.items():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Ends(nn.Sequential):
    def forward(self, x):
        for layer in self[:-1]:
            x = layer(x)
        return x + self[-1](x) + len(self)


class Children(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        for child in list(self.children())[:-1]:
            x = child(x)
        for child in self._modules.values():
            x = child(x)
        return x + list(self.children())[-1](x)


class Listed(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = layer(x) + len(self[1:])
        return self[-1](x)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["dense", "ends", "children", "list"])
def test_a_forward_that_iterates_sees_its_own_children(kind, compiled):
    models = {
        "dense": lambda: Dense({"a": nn.Linear(6, 3), "b": nn.Linear(9, 3)}),
        "ends": lambda: Ends(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)),
        "children": Children,
        "list": lambda: Listed([nn.Linear(6, 6), nn.Linear(6, 6)]),
    }
    counts = {"dense": {"cat": 3}, "ends": {"add": 2}, "children": {"add": 1}, "list": {"add": 2}}
    model, x = models[kind](), rand(2, 6)
    expected = model(x)
    operand = (0, 0) if kind == "dense" else (0,)
    site = place(f"{next(iter(counts[kind]))}#0", *operand)
    apply_plan(model, plan(planned(site), counts={"": counts[kind]}))
    (quantizer,) = (m for m in model.modules() if isinstance(m, TensorQuantizer))
    quantizer.disable()
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    assert torch.equal(run(x), expected)
    quantizer.enable()
    assert not torch.equal(run(x), expected)
    assert model._call_quantizers in list(model.children())
    model.eval()
    assert not quantizer.training


def entries(kind):
    model = Ends(*(nn.Linear(6, 6) for _ in range(3)))
    site, counts = place("add#0", 0), {"add": 2}
    if kind == "list":
        model, counts = Listed(list(model)), {"add": 3}
    return apply_plan(model, plan(planned(site), counts={"": counts}))


@pytest.mark.parametrize("kind", ["ends", "list"])
def test_entries_are_added_and_taken_away_beside_the_quantizers(kind):
    model = entries(kind)
    first, second, third = model
    new = [nn.Linear(6, 6) for _ in range(6)]
    held = model._call_quantizers
    model.append(new[0])
    assert model[3] is model[-1] is new[0] and model[3:][0] is new[0]
    model.insert(0, new[1])
    assert list(model) == [new[1], first, second, third, new[0]] == [model[i] for i in range(5)]
    model.extend([new[2]])
    model += nn.Sequential(new[3])
    model.add_module("7", new[4])
    assert list(model)[-3:] == new[2:5] and model[-1] is new[4]
    assert model.pop(-1) is new[4]
    del model[5:]
    del model[0]
    model[1] = new[5]
    assert list(model) == [first, new[5], third, new[0]] == [model[i] for i in range(-4, 0)]
    assert list(model._modules) == ["0", "1", "2", "3", "_call_quantizers"]
    assert model._call_quantizers is held
    with pytest.raises(IndexError):
        model[4]


def test_a_dictionary_is_cleared_of_its_entries():
    model = Dense({"a": nn.Linear(6, 3), "b": nn.Linear(9, 3)})
    apply_plan(model, plan(planned(place("cat#0", 0, 0)), counts={"": {"cat": 3}}))
    model.clear()
    assert len(model) == 0 and list(model._modules) == ["_call_quantizers"]
