import command_models
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytorch_quant import INT8, quantize
from pytorch_quant.commands.rule_files import read_rules, resolved, write_rules


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "rules.yaml"
        path.write_text(text)
        return path

    return write


def test_names_globs_types_and_functions(written):
    rules = read_rules(
        written(
            '{"block*": null, "fc": "INT8_PER_TENSOR", "torch.nn.Linear": "INT8_DYNAMIC",'
            '"torch.nn.functional.linear": null, "torch.add": FP8, "torch.Tensor.add": null,'
            '"command_models.Block": INT8, "block.conv": null, "block/add#0": null}'
        )
    )
    model = command_models.Net(4)
    assert list(resolved(rules, model).items()) == [
        ("block*", None),
        ("fc", "INT8_PER_TENSOR"),
        (nn.Linear, "INT8_DYNAMIC"),
        (F.linear, None),
        (torch.add, "FP8"),
        (torch.Tensor.add, None),
        (command_models.Block, "INT8"),
        ("block.conv", None),
        ("block/add#0", None),
    ]


def test_quantize_takes_them(written):
    model = command_models.Net(16)
    rules = resolved(read_rules(written("{torch.nn.Conv2d: null, fc: INT8}")), model)
    quantize(model, rules, placement="none")
    quantized = {n.rpartition(".")[0] for n, _ in model.named_modules() if "quantizer" in n}
    assert quantized == {"fc"}


def test_a_name_of_the_model_wins():
    model = nn.ModuleDict({"torch": nn.ModuleDict({"add": nn.Linear(2, 2)})})
    assert resolved({"torch.add": None}, model) == {"torch.add": None}


@pytest.mark.parametrize("name", ["torch.nn.Linaer", "command_models.Blok"])
def test_a_dotted_name_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"{name}.*did you mean '(Linear|Block)'"):
        resolved({name: None}, nn.Linear(2, 2))


def test_nothing_is_imported():
    # The name of a file in the current folder may be the first part of a misspelt layer.
    assert resolved({"setup.py": None}, nn.Linear(2, 2)) == {"setup.py": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{0: INT8}", "key 0 as a int; put it in quotes"),
        ("{0.10: INT8}", "key 0.1 as a float"),
        ("[fc]", "mapping"),
        ("fc: off", "scheme or null, got False"),
        ("fc: [", "no YAML file"),
        ("fc: None", "to leave it float write null, got 'None'"),
    ],
)
def test_wrong_files(written, text, message):
    with pytest.raises(ValueError, match=message):
        read_rules(written(text))


def test_written_rules_come_back_in_order(tmp_path):
    rules = {"b*": None, "0": "INT8", "a/add#0": None, "torch.nn.Linear": INT8.name}
    write_rules(tmp_path / "r.yaml", rules)
    assert list(read_rules(tmp_path / "r.yaml").items()) == list(rules.items())
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_rules(tmp_path / "empty.yaml") == {}
