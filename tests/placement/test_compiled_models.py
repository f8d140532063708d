"""Placed models in `torch.compile(fullgraph=True)` and in strict and non-strict `torch.export`."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytorch_quant import calibrate, quantize
from pytorch_quant.models import resnet18
from pytorch_quant.nn import TensorQuantizer
from pytorch_quant.op_kinds import SPELLINGS, WRITING, op_kind, writes_first


class Gate(nn.Module):
    """A custom module whose forward has the calls that others have: operators, methods, writes."""

    def __init__(self, size):
        super().__init__()
        self.project = nn.Linear(size, size)
        self.register_buffer("shift", torch.rand(size))

    def forward(self, x):
        gate = self.project(x)
        gate += self.shift
        if gate.dim() != 2 or gate.shape[0] != x.size(0):
            raise ValueError("gate takes rows")
        mixed = torch.cat([x, gate.mT.mT], 1).chunk(2, dim=1)[0]
        return torch.add(mixed, gate.sigmoid() * x).add_(x)


class Shared(nn.Module):
    """One custom module that runs three times, and weights that two layers share."""

    def __init__(self, size=16):
        super().__init__()
        self.gate = Gate(size)
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        self.second.weight = self.first.weight

    def forward(self, x):
        for _ in range(2):
            x = self.gate(x) + x
        scores = F.softmax(self.first(x) @ self.second(x).T, -1)
        return torch.matmul(scores, self.gate(x)), {"rows": len(x)}


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS = {
    "resnet": (lambda: resnet18(num_classes=10), (2, 3, 32, 32)),
    "encoder": (encoder, (2, 16, 16)),
    "shared": (Shared, (16, 16)),
}
PLACEMENTS = pytest.mark.parametrize("placement", ["tensorrt", "onnxruntime", "openvino"])


@pytest.fixture(params=MODELS)
def network(request):
    make, shape = MODELS[request.param]
    return make().eval(), torch.randn(shape)


def placed(network, placement):
    model, x = network
    model = quantize(model, example_inputs=x, placement=placement)
    calibrate(model, [x], progress=False)
    return model, x


def first(result):
    return result[0] if isinstance(result, tuple) else result


@PLACEMENTS
def test_one_graph_that_stays_when_ranges_change(network, placement):
    model, x = placed(network, placement)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(first(compiled(x)), first(model(x)))
        before = first(model(x))
        for quantizer in model.modules():
            if isinstance(quantizer, TensorQuantizer) and quantizer.amax is not None:
                quantizer.amax = quantizer.amax * 0.3
        with torch.compiler.set_stance("fail_on_recompile"):
            got = first(compiled(x))
        torch.testing.assert_close(got, first(model(x)))
        assert not torch.allclose(got, before)


def test_gradients_of_one_graph(network):
    model, x = placed(network, "onnxruntime")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        first(run(x)).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for wanted, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs(network, strict):
    model, x = placed(network, "onnxruntime")
    with warnings.catch_warnings():
        # A strict export speaks of side effects, which are the counters of the frame.
        warnings.simplefilter("ignore", UserWarning)
        program = torch.export.export(model, (x,), strict=strict)
    quantizers = sum(isinstance(m, TensorQuantizer) for m in model.modules())
    marked = [n for n in program.graph.nodes if "pytorch_quant.fake_quantize" in str(n.target)]
    assert len(marked) >= quantizers
    torch.testing.assert_close(first(program.module()(x)), first(model(x)))


def test_every_spelling_is_in_the_table_that_compiled_code_reads():
    x, y = torch.rand(3, 3), torch.rand(3, 3)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    calls = {
        "add": lambda: (x + y, 1 + x, x.add(y), torch.add(x, y), x.clone().add_(y)),
        "mul": lambda: (x * y, 2 * x, x.mul(y), torch.mul(x, y), torch.multiply(x, y)),
        "matmul": lambda: (x @ y, x.mm(y), torch.matmul(x, y), torch.mv(x, y[0])),
        "cat": lambda: (torch.cat([x, y]), torch.concat([x, y])),
        "linear": lambda: (F.linear(x, y),),
        "conv": lambda: (
            F.conv2d(x[None, None], y[None, None]),
            torch.conv2d(*[x[None, None]] * 2),
        ),
        "scaled_dot_product_attention": lambda: (
            F.scaled_dot_product_attention(*[x[None, None]] * 3),
        ),
    }
    for kind, call in calls.items():
        seen.clear()
        with Watch():
            call()
        of_kind = [f for f in seen if op_kind(f) == kind]
        assert len(of_kind) >= len(call())
        assert all(any(f is known for known in SPELLINGS[kind]) for f in of_kind), kind
    assert torch.Tensor.add_ in WRITING["add"] and torch.add not in WRITING["add"]
    assert all(writes_first(f) for functions in WRITING.values() for f in functions)


def test_calls_of_operators_are_counted_in_compiled_code():
    class Operators(nn.Module):
        def forward(self, x, y):
            return torch.ops.aten.add.Tensor(x, y) + y

    model, args = Operators(), (torch.rand(4, 4), torch.rand(4, 4))
    site = {"/add#0": "INT8_PER_TENSOR", "/add#1": "INT8_PER_TENSOR"}
    quantize(model, site, example_inputs=args)
    calibrate(model, [args], forward=lambda model, batch: model(*batch), progress=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), model(*args))
    assert not torch.equal(model(*args), args[0] + args[1] + args[1])
