import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from pytorch_quant.export import engines
from pytorch_quant.export.engines import absence, fastest_engine, installed, open_session

RUNNING = [engine for engine in ("onnxruntime", "openvino", "reference") if installed(engine)]


def product(dtype=TensorProto.FLOAT, rows="n", opset=20):
    """`(n, 3) x (3, 2)` and the sum of its rows."""
    weight = helper.make_tensor("w", dtype, (3, 2), [1, 2, 3, 4, 5, 6])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        "product",
        [helper.make_tensor_value_info("x", dtype, [rows, 3])],
        [helper.make_tensor_value_info(name, dtype, [rows, 2]) for name in "yz"],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize("engine", RUNNING)
@pytest.mark.parametrize("on_disk", [True, False])
def test_runs(tmp_path, engine, on_disk):
    model = product()
    if on_disk:
        onnx.save(model, tmp_path / "m.onnx")
        model = tmp_path / "m.onnx"
    session = open_session(model, engine, threads=1)
    assert [str(p) for p in session.inputs] == ["'x' (float32, (?, 3))"]
    assert [p.name for p in session.outputs] == ["y", "z"]
    # Not contiguous, and with a gradient.
    x = torch.randn(3, 4).T.requires_grad_()
    weight = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    y, z = session.run([x])
    np.testing.assert_allclose(y, x.detach().numpy() @ weight, rtol=1e-6)
    assert torch.equal(z, -y) and not y.requires_grad
    kept = y.clone()
    session.run([torch.zeros(4, 3)])
    assert torch.equal(y, kept)
    y.add_(1)


def test_bfloat16_runs_in_the_reference():
    model = product(TensorProto.BFLOAT16)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    y, _ = open_session(model, "reference").run([x])
    assert y.dtype == torch.bfloat16 and y[0].tolist() == [9.0, 12.0]
    with pytest.raises(RuntimeError, match=r"takes no bfloat16 arrays; export model\.float"):
        open_session(model, "onnxruntime")


@pytest.mark.parametrize("engine", RUNNING)
def test_a_model_that_cannot_be_loaded(engine):
    model = product()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(RuntimeError):
        open_session(model, engine).run([torch.ones(1, 3)])


def test_wrong_use(monkeypatch):
    with pytest.raises(ValueError, match="engine must be one of onnxruntime, openvino, reference"):
        open_session(product(), "ort")
    for threads in (0, 1.5):
        with pytest.raises(ValueError, match="threads must be a number >= 1"):
            open_session(product(), "onnxruntime", threads=threads)
    session = open_session(product(rows=2), "onnxruntime")
    for tensors, error, message in (
        ([], ValueError, "takes 1 input"),
        ([torch.ones(3, 3)], ValueError, r"\(2, 3\)\), got shape \(3, 3\)"),
        ([torch.ones(2, 3, 1)], ValueError, r"got shape \(2, 3, 1\)"),
        ([torch.ones(2, 3).long()], TypeError, r"got torch\.int64"),
        ([torch.ones(2, 3, device="meta")], RuntimeError, "'x' is on meta"),
    ):
        with pytest.raises(error, match=message):
            session.run(tensors)


def test_an_engine_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match="needs openvino"):
        open_session(product(), "openvino")
    assert not installed("openvino") and "pytorch-quant[openvino]" in absence("openvino")
    assert absence("reference") == ""


def test_tensorrt_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert absence("tensorrt") == "needs a CUDA device, and torch finds none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert absence("tensorrt") == "not installed; install it with pip install tensorrt"


def test_the_fastest(monkeypatch):
    for machine, first, second in (
        ("aarch64", "onnxruntime", "openvino"),
        ("AMD64", "openvino", "onnxruntime"),
    ):
        monkeypatch.setattr(engines.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(engines, "installed", lambda engine: True)
        assert fastest_engine() == first
        monkeypatch.setattr(engines, "installed", second.__eq__)
        assert fastest_engine() == second
    monkeypatch.setattr(engines, "installed", lambda engine: False)
    with pytest.raises(ImportError, match=r"\[openvino\].* or .*\[onnxruntime\]"):
        fastest_engine()
