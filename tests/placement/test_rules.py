"""Rules: what they match, which one wins, and what is refused."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytorch_quant.placement.rules import Rules
from pytorch_quant.scheme import FP8, INT4_WEIGHT_ONLY, INT8, INT8_PER_TENSOR


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)


class Root(nn.Module):
    pass


def bind(rules):
    model = Root()
    model.stem, model.layer1, model.head = nn.Conv2d(3, 3, 1), nn.Sequential(Block()), Block()
    model.again = model.layer1[0]
    sites = {
        "stem": "conv",
        "layer1.0.conv1": "conv",
        "layer1.0.fc": "linear",
        "layer1.0/add#0": "add",
        "layer1.0/matmul#0": "matmul",
        "head.conv1": "conv",
        "head.fc": "linear",
        "/add#0": "add",
    }
    return Rules(rules).bind(dict(model.named_modules()), sites), sites


def chosen(rules, site):
    bound, sites = bind(rules)
    choice = bound.choice(site, sites[site])
    return choice.scheme, choice.kind


PRECEDENCE = [
    # rules, site, scheme, the kind of rule that decides
    ({}, "stem", INT8, "default"),
    (None, "stem", INT8, "default"),
    ({"*": FP8}, "stem", FP8, "default"),
    ({"*": FP8, nn.Conv2d: None}, "stem", FP8, "default"),
    ({nn.Conv2d: FP8}, "stem", FP8, "type"),
    ({nn.Conv2d: FP8}, "layer1.0.fc", INT8, "default"),
    ({Block: FP8}, "layer1.0.fc", FP8, "type"),
    ({Block: FP8}, "layer1.0/add#0", FP8, "type"),
    ({Block: FP8, nn.Linear: None}, "layer1.0.fc", None, "type"),
    ({nn.Linear: None, Block: FP8}, "layer1.0.fc", FP8, "type"),
    ({torch.add: FP8}, "/add#0", FP8, "type"),
    ({operator.add: FP8}, "/add#0", FP8, "type"),
    ({torch.Tensor.__add__: FP8}, "/add#0", FP8, "type"),
    ({torch.matmul: None}, "layer1.0/matmul#0", None, "type"),
    ({torch.bmm: None}, "layer1.0/matmul#0", None, "type"),
    ({F.linear: None}, "layer1.0.fc", None, "type"),
    ({F.linear: None, nn.Linear: FP8}, "layer1.0.fc", FP8, "type"),
    ({"*.fc": None, nn.Linear: FP8}, "layer1.0.fc", None, "glob"),
    ({"*.fc": None, "layer1*": FP8}, "layer1.0.fc", FP8, "glob"),
    ({"layer1*": FP8, "*.fc": None}, "layer1.0.fc", None, "glob"),
    ({"layer1*": FP8}, "layer1.0/add#0", FP8, "glob"),
    ({"*add#0": None}, "/add#0", None, "glob"),
    ({"*ayer1": None}, "layer1.0.conv1", None, "glob"),
    ({"layer?.0.conv1": None}, "layer1.0.conv1", None, "glob"),
    ({"layer1": None}, "layer1.0.conv1", None, "exact"),
    ({"layer1": None}, "layer1.0/add#0", None, "exact"),
    ({"layer1": None}, "head.conv1", INT8, "default"),
    ({"layer1.0.fc": FP8, "layer1": None, "*.fc": None}, "layer1.0.fc", FP8, "exact"),
    ({"layer1.0": FP8, "layer1": None}, "layer1.0.fc", FP8, "exact"),
    ({"layer1": None, "layer1.0/add#0": FP8}, "layer1.0/add#0", FP8, "exact"),
    ({"/add#0": None}, "/add#0", None, "exact"),
    ({"": None}, "layer1.0.fc", None, "exact"),
    ({"": None}, "/add#0", None, "exact"),
    ({"": None, "layer1": FP8}, "layer1.0.fc", FP8, "exact"),
    ({"": FP8, "layer1": None}, "layer1.0.fc", None, "exact"),
    ({Root: None}, "/add#0", None, "type"),
    ({Root: None}, "layer1.0.fc", None, "type"),
    ({F.conv2d: None}, "stem", None, "type"),
    ({F.conv1d: None}, "stem", INT8, "default"),
    ({"again": None}, "layer1.0.conv1", None, "exact"),
    ({"again.fc": None, "layer1": FP8}, "layer1.0.fc", None, "exact"),
    ({"again.f*": None}, "layer1.0.fc", None, "glob"),
    ({"stem": "INT8_PER_TENSOR"}, "stem", INT8_PER_TENSOR, "exact"),
]


@pytest.mark.parametrize(("rules", "site", "scheme", "kind"), PRECEDENCE)
def test_precedence(rules, site, scheme, kind):
    assert chosen(rules, site) == (scheme, kind)


def test_which_rules_aim_at_a_site():
    bound, _ = bind({"layer1": FP8, "head.fc": FP8, torch.add: FP8, Block: FP8, nn.Conv2d: FP8})
    aimed = {site: bound.choice(site, op).aimed for site, op in bind({})[1].items()}
    assert aimed == {
        "stem": True,
        "layer1.0.conv1": False,
        "layer1.0.fc": False,
        "layer1.0/add#0": False,
        "layer1.0/matmul#0": False,
        "head.conv1": True,
        "head.fc": True,
        "/add#0": True,
    }


def test_a_default_is_not_explicit():
    for rules, explicit in (({}, False), ({"*": FP8}, False), ({"st*": FP8}, True)):
        assert bind(rules)[0].choice("stem", "conv").explicit is explicit


def test_types_that_fit_nothing_are_idle():
    assert bind({nn.Conv3d: None, nn.Linear: None, torch.cat: None})[0].idle == [
        nn.Conv3d,
        torch.cat,
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("layer1.0.conv2", r"'layer1\.0\.conv2'.*did you mean 'layer1\.0\.conv1'"),
        ("layer1.0/add#1", r"did you mean 'layer1\.0/add#0'"),
        ("layer9*", "no module or call has this glob"),
        ("zzz", "no module or call has this name; Calls"),
    ],
)
def test_names_that_match_nothing(key, message):
    with pytest.raises(ValueError, match=message):
        bind({key: None})


def test_a_scheme_for_nothing():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    rules = dict(model.named_modules()), {"0": "conv"}
    Rules({"1": None}).bind(*rules)
    with pytest.raises(ValueError, match="nothing in it can be quantized"):
        Rules({"1": INT8}).bind(*rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("a", None)], "must be a mapping, got list"),
        ("layer1", "must be a mapping, got str"),
        ({3: None}, "the key 3"),
        ({int: None}, "the key <class 'int'>"),
        ({nn.Linear(2, 2): None}, "the key Linear"),
        ({"layer1": 8}, "got 8 of type int"),
        ({"layer1": False}, "got False of type bool"),
        ({"layer1": INT4_WEIGHT_ONLY.weight}, "of type QuantDescriptor"),
    ],
)
def test_rules_of_the_wrong_type(rules, message):
    with pytest.raises(TypeError, match=message) as error:
        Rules(rules)
    assert "INT8_PER_TENSOR" in str(error.value)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="'fp9'; did you mean 'FP8'"):
        Rules({"layer1": "fp9"})
