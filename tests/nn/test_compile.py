"""Quantized models under torch.compile: one graph, compiled once."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import pytorch_quant
from pytorch_quant import QuantDescriptor, TensorQuantizer, fake_quant
from pytorch_quant import nn as quant_nn
from pytorch_quant.formats import make_format


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Residual(nn.Module):
    # Fewer channels than 32 are left float, as a runtime gains nothing there.
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)) + x)
        return self.fc(self.pool(x).flatten(1))


def batch(size=4):
    return torch.randn(size, 3, 8, 8)


def placed():
    model = pytorch_quant.quantize(Residual().eval(), example_inputs=batch())
    pytorch_quant.calibrate(model, [batch()], progress=False)
    assert any("_call_quantizers" in name for name, _ in model.named_modules())
    return model


def quantizers(model):
    return [m for m in model.modules() if isinstance(m, TensorQuantizer)]


def assert_one_graph(graphs=1):
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_ten_steps_with_changing_ranges():
    model, x = placed().train(), batch()
    eager = pytorch_quant.quantize(Residual().eval(), example_inputs=x)
    eager.load_state_dict(model.state_dict())
    eager.train()
    pairs = []
    for each in (model, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        inner = getattr(each, "_orig_mod", each)
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
        losses = []
        for step in range(10):
            for quantizer in quantizers(inner):
                quantizer.amax = quantizer.amax * (0.9 + 0.02 * step)
            optimizer.zero_grad()
            loss = each(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        pairs.append(losses)
    assert_one_graph()
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-5)


@pytest.mark.slow
def test_the_batch_size_may_vary():
    model = placed()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(batch(4))
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in (2, 7, 5):
                x = batch(size)
                assert torch.equal(compiled(x), model(x))
    assert_one_graph()


@pytest.mark.parametrize(
    "desc",
    [
        QuantDescriptor(),
        QuantDescriptor(axis=1),
        QuantDescriptor(num_bits=(4, 3)),
        QuantDescriptor(unsigned=True),
        QuantDescriptor(dynamic=True),
    ],
    ids=["tensor", "channel", "e4m3", "unsigned", "dynamic"],
)
def test_every_kind_of_quantizer(desc):
    quantizer = TensorQuantizer(desc)
    if not desc.dynamic:
        quantizer.amax = 1.5 if desc.axis is None else torch.rand(1, 5) + 0.5
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    results = []
    x = torch.randn(6, 5)
    for form in (quantizer, compiled):
        leaf = x.clone().requires_grad_()
        y = form(leaf)
        (y * torch.arange(5.0)).sum().backward()
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert_one_graph()


def test_calibrating_a_compiled_model_runs_it_uncompiled():
    model, x = placed(), batch() * 3
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    pytorch_quant.calibrate(compiled, [x], progress=False)
    assert model.conv1.input_quantizer.amax == x.abs().max()
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), model(x))
    assert_one_graph()


@pytest.mark.filterwarnings("ignore:.*found no compiled frames:UserWarning")
def test_collecting_in_compiled_code_is_explained():
    model = quant_nn.QuantLinear(3, 3)
    x = torch.randn(2, 3)
    pytorch_quant.calibrate(model, [x], progress=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    model.input_quantizer.enable_calib()
    model.input_quantizer.disable_quant()
    with pytest.raises(Exception, match=r"set_stance\(.*force_eager.*disable_calib") as caught:
        compiled(x)
    assert "calibrate(model, batches)" in str(caught.value)
    with torch.compiler.set_stance("force_eager"):
        compiled(x * 2)
    model.input_quantizer.load_calib_amax()
    assert model.input_quantizer.amax == (x * 2).abs().max()


@pytest.mark.slow
def test_collecting_falls_back_where_graphs_may_break():
    model = quant_nn.QuantLinear(3, 3)
    x = torch.randn(2, 3)
    pytorch_quant.calibrate(model, [x], progress=False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    quantizer = model.input_quantizer
    quantizer.enable_calib()
    quantizer.disable_quant()
    compiled(x * 2)
    quantizer.load_calib_amax()
    quantizer.disable_calib()
    quantizer.enable_quant()
    assert quantizer.amax == (x * 2).abs().max()
    assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_default_compiler_gives_the_same_codes():
    fmt = make_format(8)
    ties = (torch.arange(-140, 140) + 0.5) * (1.0 / 127)
    x = torch.stack((torch.randn(280), ties))
    amax = torch.tensor([[0.7], [1.0]])
    results = []
    for form in (fake_quant.fake_quantize, torch.compile(fake_quant.fake_quantize, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = form(leaf, amax, fmt)
        y.backward(x)
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
