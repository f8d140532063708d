import os
import stat

import pytest
import torch
from torch import nn

from pytorch_quant.batches import call_model, count
from pytorch_quant.files import written_aside
from pytorch_quant.optional import is_installed, require


class Flexible(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


class One(nn.Module):
    def forward(self, x, mask=None):
        return x, mask


class Two(nn.Module):
    def forward(self, x, y):
        return x, y


def test_the_rule_for_batches():
    x, y = torch.zeros(1), torch.ones(1)
    assert call_model(One(), x) == (x, None)
    assert call_model(One(), (x, y)) == (x, None)
    assert call_model(One(), [x, y]) == (x, None)
    assert call_model(One(), (x,)) == (x, None)
    assert call_model(Two(), (x, y)) == (x, y)
    assert call_model(One(), {"x": x, "mask": y}) == (x, y)
    assert call_model(Flexible(), (x, y)) == ((x, y), {})
    assert call_model(nn.Identity(), (x, y)) is x


def test_counting():
    assert count([1, 2]) == 2 and count(iter([1])) is None


def test_written_aside_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(path) as aside:
        aside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with written_aside(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]
    reference = tmp_path / "reference"
    reference.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)


def test_a_missing_package_names_its_extra(monkeypatch):
    import importlib

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match=r'needs torchvision.*pip install "pytorch-quant\[vision'):
        require("torchvision.models")
    with pytest.raises(ImportError) as raised:
        require("onnxruntime")
    assert str(raised.value).endswith(
        'install it with pip install "pytorch-quant[onnxruntime]"; onnxruntime-gpu serves as well: '
        "the same module, with the CUDA and TensorRT providers"
    )
    with pytest.raises(ImportError, match=r"install it with pip install tensorrt$"):
        require("tensorrt")


def test_a_folder_that_is_left_of_a_package_is_none(monkeypatch, tmp_path):
    (tmp_path / "left_behind").mkdir()
    (tmp_path / "left_behind" / "library.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("left_behind") and is_installed("onnx")
    with pytest.raises(ImportError, match=r"holds no code.*uninstall this one too, then"):
        require("left_behind")
