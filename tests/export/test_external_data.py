"""Models whose constants do not fit into one file."""

import shutil

import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from torch import nn

from pytorch_quant import calibrate, export_onnx
from pytorch_quant import nn as quant_nn
from pytorch_quant.export import external_data


@pytest.fixture
def calibrated():
    model = nn.Sequential(quant_nn.QuantLinear(64, 64), nn.ReLU(), quant_nn.QuantLinear(64, 40))
    x = torch.randn(2, 64)
    calibrate(model.eval(), [x], progress=False)
    return model, x


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_large_constants_go_beside_the_file(tmp_path, calibrated, monkeypatch, dynamo):
    model, x = calibrated
    export_onnx(model, x, tmp_path / "small.onnx", dynamo=dynamo)
    monkeypatch.setattr(external_data, "LARGEST_DATA", 5000)
    folder = tmp_path / "large"
    folder.mkdir()
    report = export_onnx(model, x, folder / "m.onnx", dynamo=dynamo)
    assert sorted(p.name for p in folder.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.size == sum(p.stat().st_size for p in folder.iterdir())
    stored = onnx.load(folder / "m.onnx", load_external_data=False).graph.initializer
    outside = [c for c in stored if c.data_location == onnx.TensorProto.EXTERNAL]
    assert sorted(tuple(c.dims) for c in outside) == [(40, 64), (64, 64)]
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    onnx.checker.check_model(str(moved / "m.onnx"), full_check=True)
    whole, small = onnx.load(moved / "m.onnx"), onnx.load(tmp_path / "small.onnx")
    for a, b in zip(whole.graph.initializer, small.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))
    (got,) = onnx_runs.run(moved / "m.onnx", x.numpy())
    (expected,) = onnx_runs.run(tmp_path / "small.onnx", x.numpy())
    np.testing.assert_array_equal(got, expected)


def test_a_failure_leaves_the_old_pair(tmp_path, calibrated, monkeypatch):
    model, x = calibrated
    monkeypatch.setattr(external_data, "LARGEST_DATA", 5000)
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_bytes(b"precious")

    def refuse(*_, **__):
        raise onnx.checker.ValidationError("spoiled")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError, match="spoiled"):
        export_onnx(model, x, tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert all(p.read_bytes() == b"precious" for p in tmp_path.iterdir())


def test_the_size_of_constants_in_either_form():
    raw = onnx.numpy_helper.from_array(np.zeros((3, 4), np.float32), "raw")
    listed = onnx.helper.make_tensor("listed", onnx.TensorProto.FLOAT, [12], [0.0] * 12)
    graph = onnx.helper.make_graph([], "g", [], [], [raw, listed])
    assert external_data.data_size(graph) >= 96
