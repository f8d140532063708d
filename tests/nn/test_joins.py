"""`QuantAdd`, `QuantConcat` and `QuantMatMul` against NumPy, ONNX Runtime and the lint rules."""

import copy

import numpy as np
import onnx
import onnx_runs
import pytest
import reference
import torch
from torch import nn

from pytorch_quant import (
    QuantDescriptor,
    TensorQuantizer,
    calibrate,
    export_onnx,
    fold_batchnorm,
    lint_onnx,
    quant_modules,
    quantize,
    verify_onnx,
)
from pytorch_quant import nn as quant_nn

SEED = torch.Generator().manual_seed(0)
X = torch.randn(2, 4, 6, 6, generator=SEED)
# Another range than that of X.
Y = 3 * torch.randn(2, 4, 6, 6, generator=SEED)
IMAGES = torch.randn(2, 3, 8, 8, generator=SEED)


def fake(x):
    """Fake quantization to int8 with the amax of the tensor itself."""
    return reference.fake_quant(x.numpy(), reference.amax_of(x.numpy()))


CASES = {
    "add": (quant_nn.QuantAdd, lambda: X.numpy() + fake(Y)),
    "add both": (lambda: quant_nn.QuantAdd(quantize_both=True), lambda: fake(X) + fake(Y)),
    "concat": (
        lambda: quant_nn.QuantConcat(1),
        lambda: reference.fake_quant(
            np.concatenate([X.numpy(), Y.numpy()], 1), reference.amax_of(Y.numpy())
        ),
    ),
    "matmul": (quant_nn.QuantMatMul, lambda: fake(X) @ fake(Y)),
}
FLOAT = {
    "add": lambda: X + Y,
    "add both": lambda: X + Y,
    "concat": lambda: torch.cat([X, Y], 1),
    "matmul": lambda: X @ Y,
}


@pytest.mark.parametrize("case", CASES)
def test_values_equal_numpy(case):
    make, expected = CASES[case]
    layer = make()
    report = calibrate(layer, [(X, Y)], progress=False)
    quantizers = [m for m in layer.modules() if isinstance(m, TensorQuantizer)]
    assert len(report.ranges) == len(quantizers) and not report.unreached
    np.testing.assert_allclose(layer(X, Y).numpy(), expected(), rtol=1e-5, atol=1e-5)
    again = make()
    again.load_state_dict(layer.state_dict())
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for other in (again, compiled):
        assert torch.equal(other(X, Y), layer(X, Y))
    for quantizer in quantizers:
        quantizer.disable()
    assert torch.equal(layer(X, Y), FLOAT[case]())


def test_gradients_reach_both_operands():
    for case, (make, _) in CASES.items():
        layer = make()
        calibrate(layer, [(X, Y)], progress=False)
        x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
        layer(x, y).sum().backward()
        assert x.grad.abs().sum() > 0 and y.grad.abs().sum() > 0, case


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_files_run_as_they_were_simulated(case, dynamo, tmp_path):
    layer = CASES[case][0]().eval()
    calibrate(layer, [(X, Y)], progress=False)
    path = tmp_path / "join.onnx"
    export_onnx(layer, (X, Y), path, target="onnxruntime", dynamo=dynamo)
    (found,) = onnx_runs.run(path, X.numpy(), Y.numpy())
    np.testing.assert_allclose(found, layer(X, Y).numpy(), rtol=1e-5, atol=1e-5)
    quantized = [n.input[0] for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantized) == (1 if case == "add" else 2)


def test_a_list_is_concatenated_too():
    layer = quant_nn.QuantConcat(dim=2)
    layer._input_quantizer.amax = 2.0
    assert torch.equal(layer([X, Y, X]), layer(X, Y, X))
    assert torch.equal(layer((X, Y)), layer(X, Y))
    assert "dim=2" in repr(layer)


def test_descriptors():
    coarse, unsigned = QuantDescriptor(4), QuantDescriptor(8, unsigned=True)
    add = quant_nn.QuantAdd(quant_desc_input=coarse)
    assert add._input_quantizer.num_bits == 4 and add._other_quantizer is None
    assert add.input_quantizer is add._input_quantizer
    add = quant_nn.QuantAdd(True, quant_desc_input=coarse)
    assert add._other_quantizer.num_bits == 4
    add = quant_nn.QuantAdd(True, quant_desc_input=coarse, quant_desc_other=unsigned)
    assert not add._input_quantizer.unsigned and add._other_quantizer.unsigned
    product = quant_nn.QuantMatMul(quant_desc_input=unsigned, quant_desc_other=coarse)
    assert product._input_quantizer.unsigned and product._other_quantizer.num_bits == 4
    for kind in (quant_nn.QuantAdd, quant_nn.QuantConcat, quant_nn.QuantMatMul):
        before = kind.default_quant_desc_input
        kind.set_default_quant_desc_input(coarse)
        try:
            assert kind()._input_quantizer.num_bits == 4
        finally:
            kind.default_quant_desc_input = before
        assert kind()._input_quantizer.num_bits == 8
        with pytest.raises(TypeError, match=f"Unused keys: quant_desc_weight; {kind.__name__}"):
            kind(quant_desc_weight=coarse)
        with pytest.raises(ValueError, match=f"{kind.__name__}: .*must be a QuantDescriptor"):
            kind(quant_desc_input="int8")
    with pytest.raises(TypeError, match="only quantized with quantize_both=True; pass that too"):
        quant_nn.QuantAdd(quant_desc_other=coarse)


class Plain:
    """What a hand-written model does without these modules."""

    def __init__(self):
        self.add = lambda x, y: x + y
        self.cat = lambda x, y: torch.cat([x, y], 1)
        self.product = torch.matmul


class Network(nn.Module):
    """A residual block, a concatenation and a product of two activations."""

    def __init__(self, joins=None):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.side = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.mix, self.head = nn.Conv2d(32, 16, 1), nn.Linear(64, 16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.add = joins.add if joins else quant_nn.QuantAdd()
        self.cat = joins.cat if joins else quant_nn.QuantConcat(1)
        self.product = joins.product if joins else quant_nn.QuantMatMul()

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.add(self.norm(self.body(x)), x).relu()
        x = self.mix(self.cat(x, self.side(x).relu())).flatten(2).transpose(1, 2)
        return self.head(self.product(self.query(x), self.key(x).transpose(1, 2)))


def built(joins=None):
    with quant_modules.initialize():
        model = Network(joins).eval()
    if joins is None:
        # One tensor has one quantizer (L5), and a concatenation the scale of its inputs (L6).
        model.side._input_quantizer = model.mix._input_quantizer = model.cat._input_quantizer
    calibrate(model, [IMAGES, 2 * IMAGES], "percentile", progress=False)
    fold_batchnorm(model, IMAGES)
    return model


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_a_model_that_follows_the_advice_has_no_findings(dynamo, tmp_path):
    path = tmp_path / "network.onnx"
    export_onnx(built(Plain()), IMAGES, path, dynamo=dynamo)
    advised = {
        finding.rule: word
        for finding in lint_onnx(path)
        for word in ("QuantAdd", "QuantConcat", "QuantMatMul")
        if word in finding.fix
    }
    assert advised == {"L4": "QuantAdd"}
    model = built()
    export_onnx(model, IMAGES, path, dynamo=dynamo)
    assert lint_onnx(path) == []
    report = verify_onnx(path, model, IMAGES, progress=False)
    assert report.ok and not report.unmatched, str(report)


class Half(nn.Module):
    """Joins of which one operand alone is quantized: what L1 and L6 advise against."""

    def __init__(self):
        super().__init__()
        self.stem, self.side = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.one = TensorQuantizer(QuantDescriptor())
        self.cat = lambda x, y: torch.cat([self.one(x), y], 1)
        self.product = lambda x, y: torch.matmul(self.one(x), y)

    def forward(self, x):
        x, y = self.stem(x).tanh(), self.side(x).tanh()
        return self.product(x, y.transpose(2, 3)), self.cat(x, y).exp()


def test_the_advice_on_one_quantized_operand(tmp_path):
    path = tmp_path / "half.onnx"
    findings = {}
    for follows in (False, True):
        with quant_modules.initialize():
            model = Half().eval()
        if follows:
            model.cat, model.product = quant_nn.QuantConcat(1), quant_nn.QuantMatMul()
            model.one.disable()
        x = torch.randn(2, 8, 16, 16)
        calibrate(model, [x], progress=False)
        export_onnx(model, x, path)
        findings[follows] = {f.rule: f.fix for f in lint_onnx(path) if f.rule in ("L1", "L6")}
    assert "QuantMatMul" in findings[False]["L1"] and "QuantConcat" in findings[False]["L6"]
    assert findings[True] == {}


def test_quantize_leaves_them_as_they_are():
    model = Network().eval()
    calibrate(model, [IMAGES], progress=False)
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="holds 4 quantizers already and is left unchanged"):
        assert quantize(model, example_inputs=IMAGES) is model
    assert before == {name: (type(m), id(m)) for name, m in model.named_modules()}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
