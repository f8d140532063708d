"""Models by name, and checkpoints."""

import sys

import pytest
import torch
from torch import nn

from pytorch_quant.commands.checkpoints import load_state, read_checkpoint
from pytorch_quant.commands.networks import load_network


def test_a_function_of_a_module():
    model = load_network("command_models:build", {"classes": 7}).model
    assert model.fc.out_features == 7 and not model.training
    import command_models

    assert load_network("command_models:ready_made", {}).model is command_models.ready_made


def test_a_function_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_net.py").write_text("width = 3\n")
    (tmp_path / "net_of_a_file.py").write_text(
        "import beside_the_net, torch\ndef make(): return torch.nn.Linear(beside_the_net.width, 1)"
    )
    model = load_network(f"{tmp_path / 'net_of_a_file.py'}:make", {}).model
    assert model.in_features == 3


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net_of_this_folder.py").write_text("import torch\nnet = torch.nn.Identity")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_network("net_of_this_folder:net", {}).model, nn.Identity)


@pytest.mark.parametrize(
    ("spec", "arguments", "error", "message"),
    [
        ("command_models:biuld", {}, ValueError, "did you mean 'build'"),
        ("command_models:no_model", {}, TypeError, "returned a list"),
        ("command_models:np.pi", {}, TypeError, "is a float, no function"),
        ("command_models:ready_made", {"a": 1}, ValueError, "no --model-arg"),
        ("no_such_module:f", {}, ModuleNotFoundError, "no module 'no_such_module'"),
        ("no_such_file.py:f", {}, FileNotFoundError, "no_such_file.py"),
        (":build", {}, ValueError, "give module:function or file.py:function"),
        ("command_models:", {}, ValueError, "give module:function or file.py:function"),
        (
            "command_models:build",
            {"a": 1},
            RuntimeError,
            "'command_models:build' could not be .*'a'",
        ),
        ("command_models:fails", {}, RuntimeError, "fails' could not be built: KeyError: 'inside'"),
    ],
)
def test_wrong_names(spec, arguments, error, message):
    with pytest.raises(error, match=message):
        load_network(spec, arguments)


def test_a_model_of_torchvision(tmp_path):
    try:
        from torchvision.models import resnet18
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    with pytest.raises(ValueError, match="resnet18 comes without weights"):
        load_network("resnet18", {})
    with pytest.raises(ValueError, match="did you mean resnet18"):
        load_network("resent18", {}, "random")
    with pytest.raises(
        ValueError, match="no file, and torchvision's weights of resnet18 are IMAGENET"
    ):
        load_network("resnet18", {}, "none.pt")
    expected = resnet18(num_classes=3)
    torch.save(expected.state_dict(), tmp_path / "r.pt")
    model = load_network("resnet18", {"num_classes": 3}, str(tmp_path / "r.pt")).model
    assert torch.equal(model.layer1[0].conv1.weight, expected.layer1[0].conv1.weight)


@pytest.mark.parametrize("form", ["plain", "model", "state_dict", "module."])
def test_checkpoints_of_several_forms(tmp_path, form):
    state = nn.Linear(2, 3).state_dict()
    held = (
        {f"module.{name}": value for name, value in state.items()} if form == "module." else state
    )
    torch.save(
        held if form in ("plain", "module.") else {form: held, "epoch": 3}, tmp_path / "c.pt"
    )
    found = read_checkpoint(tmp_path / "c.pt")
    assert found.placement is None and found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], state[name]) for name in state)


def test_checkpoints_that_are_none(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="holds no state_dict"):
        read_checkpoint(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"pickled model.*save model.state_dict\(\)"):
        read_checkpoint(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(path)
    torch.save(nn.Linear(200, 20).state_dict(), path)
    whole = path.read_bytes()
    for length in (0, len(whole) // 4, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"c\.pt is no checkpoint.* \w+$|c\.pt is no .*: \w+"):
            read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")


def test_a_state_that_does_not_fit():
    state = {"weight": torch.ones(3, 4), "other": torch.ones(1)}
    with pytest.raises(RuntimeError) as error:
        load_state(nn.Linear(2, 3), state, "c.pt")
    assert str(error.value) == (
        "c.pt does not fit Linear; entries missing 1 (bias); not in the model 1 (other); "
        "of another shape 1 (weight (3, 4) for (3, 2))"
    )
    ranges = {**nn.Linear(2, 3).state_dict(), "_input_quantizer._amax": torch.ones(())}
    with pytest.raises(RuntimeError, match="give a quantized checkpoint as --checkpoint"):
        load_state(nn.Linear(2, 3), ranges, "c.pt")
