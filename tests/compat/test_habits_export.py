"""Habits of existing programs, by their number: exporting, saving and wrapping models."""

import copy
import sys
import warnings
from unittest import mock

import numpy as np
import onnx
import onnx_runs
import pytest
import torch
from old_programs import BATCHES, conv_and_linear, quantizers, tutorial_loop
from torch import nn
from torch.utils.checkpoint import checkpoint

EXPORTERS = pytest.mark.parametrize(
    "options", [{}, {"dynamo": False}], ids=["default", "torchscript"]
)


@pytest.fixture
def model(old):
    return tutorial_loop(old, conv_and_linear(old), BATCHES)


def export(model, path, options, **more):
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        # torch deprecates one exporter, and says so when it converts an opset down.
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (BATCHES[0],), path, opset_version=13, **options, **more)
    return onnx.load(path)


def nodes(file, kind):
    return [n for n in file.graph.node if n.op_type == kind]


def value_of(file, name):
    for tensor in file.graph.initializer:
        if tensor.name == name:
            return onnx.numpy_helper.to_array(tensor)
    (node,) = [n for n in file.graph.node if name in n.output]
    return onnx.numpy_helper.to_array(node.attribute[0].t)


@EXPORTERS
def test_5_and_18_export_with_the_flag(old, model, tmp_path, options):
    old.nn.TensorQuantizer.use_fb_fake_quant = True
    path = str(tmp_path / "m.onnx")
    file = export(model, path, options, do_constant_folding=True, input_names=["images"])
    with torch.no_grad():
        shown = model(BATCHES[0]).numpy()
    old.nn.TensorQuantizer.use_fb_fake_quant = False
    onnx.checker.check_model(file)
    assert len(nodes(file, "QuantizeLinear")) == len(nodes(file, "DequantizeLinear")) == 4
    (got,) = onnx_runs.run(path, BATCHES[0].numpy())
    np.testing.assert_allclose(got, shown, atol=1e-6)
    np.testing.assert_allclose(got, model(BATCHES[0]).detach(), atol=1e-6)


def test_5_the_flag_means_torch_functions(old, model):
    x, layer = BATCHES[0], model[0]
    old.nn.TensorQuantizer.use_fb_fake_quant = True
    scale = float(layer._input_quantizer._amax) / 127
    wanted = torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)
    torch.testing.assert_close(layer._input_quantizer(x), wanted, rtol=0, atol=0)
    scales = layer._weight_quantizer._amax.flatten() / 127
    zeros = torch.zeros(4, dtype=torch.int32)
    wanted = torch.fake_quantize_per_channel_affine(layer.weight, scales, zeros, 0, -128, 127)
    torch.testing.assert_close(layer._weight_quantizer(layer.weight), wanted, rtol=0, atol=0)


def test_5_the_flag_on_one_instance(old, model):
    model[0]._input_quantizer.use_fb_fake_quant = True
    with mock.patch("torch.fake_quantize_per_tensor_affine", side_effect=KeyError) as called:
        model[3](torch.randn(1, 144))
        with pytest.raises(KeyError):
            model(BATCHES[0])
    called.assert_called_once()


def test_7_checkpoints(old, model, tmp_path):
    from pytorch_quant.compat import load_checkpoint

    x = BATCHES[0]
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save({"model": model}, tmp_path / "model.pt")
    state = torch.load(tmp_path / "state.pt")
    assert state["0._weight_quantizer._amax"].shape == (4, 1, 1, 1)
    fresh = conv_and_linear(old)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    whole = load_checkpoint(tmp_path / "model.pt", weights_only=False)["model"]
    torch.testing.assert_close(whole(x), model(x), rtol=0, atol=0)


def test_10_copies_and_averages(old, model):
    x = BATCHES[0]
    y = model(x).detach()
    for same in (copy.deepcopy(model), nn.DataParallel(model)):
        torch.testing.assert_close(same(x), model(x), rtol=0, atol=0)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    torch.testing.assert_close(average(x).detach(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x).detach()
    assert mixed.dtype == torch.bfloat16
    assert float((mixed - y).abs().max()) < 0.05 * float(y.abs().max())


def test_10_data_parallel_processes(old, model, tmp_path, monkeypatch):
    # torch.distributed replaces it, for good.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(BATCHES[0]).sum().backward()
        torch.testing.assert_close(wrapped(BATCHES[0]), model(BATCHES[0]))
    finally:
        torch.distributed.destroy_process_group()
    assert model[0].weight.grad.abs().sum() > 0


@EXPORTERS
def test_15_reading_the_file_back(old, model, tmp_path, options):
    file = export(model, str(tmp_path / "m.onnx"), options)
    initializers = {i.name: onnx.numpy_helper.to_array(i) for i in file.graph.initializer}
    by_input = {n.input[0]: n for n in nodes(file, "QuantizeLinear")}
    for name in ("0.weight", "3.weight"):
        assert initializers[name].dtype == np.float32 and name in by_input
    image = file.graph.input[0].name
    assert [n.op_type for n in file.graph.node if image in n.input] == ["QuantizeLinear"]
    scale = value_of(file, by_input[image].input[1])
    np.testing.assert_array_equal(scale, model[0]._input_quantizer._amax / 127)
    (relu,) = nodes(file, "Relu")
    after = [n for n in file.graph.node if relu.output[0] in n.input]
    assert {n.op_type for n in after} <= {"QuantizeLinear", "Reshape", "Flatten"}


@EXPORTERS
def test_15_export_before_calibrating(old, tmp_path, options):
    model = conv_and_linear(old)
    old.nn.TensorQuantizer.use_fb_fake_quant = True
    file = export(model, str(tmp_path / "m.onnx"), options)
    assert len(nodes(file, "QuantizeLinear")) == 4
    first = next(n for n in nodes(file, "QuantizeLinear") if n.input[0] == file.graph.input[0].name)
    if options:
        # torch.export shows a quantizer no values; there the file computes the scale as it runs.
        wanted = np.abs(BATCHES[0].numpy()).max() / np.float32(127)
        np.testing.assert_allclose(value_of(file, first.input[1]), wanted, rtol=1e-6)
    (got,) = onnx_runs.run(tmp_path / "m.onnx", BATCHES[0].numpy())
    np.testing.assert_allclose(got, model(BATCHES[0]).detach(), atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_16_trace_and_save(old, model, tmp_path):
    old.nn.TensorQuantizer.use_fb_fake_quant = True
    with torch.no_grad():
        traced = torch.jit.trace(model, BATCHES[0])
        torch.jit.save(traced, tmp_path / "m.pt")
        graph = str(traced.inlined_graph)
        assert graph.count("aten::fake_quantize_per_tensor_affine") == 2
        assert graph.count("aten::fake_quantize_per_channel_affine") == 2
        loaded = torch.jit.load(tmp_path / "m.pt")
        torch.testing.assert_close(loaded(BATCHES[1]), model(BATCHES[1]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_10_trace_without_the_flag(old, model):
    with torch.no_grad():
        traced = torch.jit.trace(model, BATCHES[0])
        torch.testing.assert_close(traced(BATCHES[1]), model(BATCHES[1]))


def test_17_half_and_back(old, model, tmp_path):
    torch.save({"model": copy.deepcopy(model).half()}, tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)["model"]
    fresh = conv_and_linear(old)
    fresh.load_state_dict(loaded.float().state_dict())
    amax = {n: q._amax for n, q in quantizers(old, model).items()}
    for name, q in quantizers(old, fresh).items():
        assert q._amax.dtype == torch.float32
        torch.testing.assert_close(q._amax, amax[name], rtol=0, atol=0)
    x = BATCHES[0]
    torch.testing.assert_close(fresh(x), model(x), atol=0.02, rtol=0.02)


def test_17_average_of_the_state(old, model):
    average = copy.deepcopy(model)
    with torch.no_grad():
        for value, new in zip(
            average.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if value.dtype.is_floating_point:
                value.mul_(0.5).add_(0.5 * new.detach())
    torch.testing.assert_close(average(BATCHES[0]), model(BATCHES[0]))


def test_17_amax_created_on_load(old, model):
    # What from_pretrained does: a model without storage, filled with the tensors of the file.
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.device("meta"):
        empty = conv_and_linear(old)
    empty.load_state_dict(state, strict=True, assign=True)
    assert all(not v.is_meta for v in empty.state_dict().values())
    torch.testing.assert_close(empty(BATCHES[0]), model(BATCHES[0]), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_17_activation_checkpointing(old, model, reentrant):
    x = BATCHES[0].clone().requires_grad_()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        run(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
        x.grad = None
        model.zero_grad()
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)
