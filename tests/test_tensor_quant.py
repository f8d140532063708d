from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import reference
import torch
from torch import nn

from pytorch_quant import QuantDescriptor, quant_functions, tensor_quant

CASES = [
    (bits, unsigned, narrow)
    for bits in (2, 4, 8, 12)
    for unsigned, narrow in ((False, True), (False, False), (True, True), (True, False))
]


def example(unsigned=False, dtype=torch.float32):
    x = torch.randn(3, 4, 5, dtype=torch.float64) * 3
    return (x.abs() if unsigned else x).to(dtype)


def amaxes():
    return [
        torch.tensor(2.5),
        torch.tensor([1.5]),
        torch.rand(3, 1, 1) * 4 + 0.1,
        torch.rand(1, 4, 1) * 4 + 0.1,
        torch.rand(4, 5) + 1,
        2.5,
    ]


def inside(x, amax):
    return (np.abs(x.detach().numpy()) <= np.asarray(amax)).astype(np.float32)


@pytest.mark.parametrize(("bits", "unsigned", "narrow"), CASES)
@pytest.mark.parametrize("which", range(len(amaxes())))
def test_codes_and_values_equal_numpy(bits, unsigned, narrow, which):
    x, amax = example(unsigned), amaxes()[which]
    q, scale = tensor_quant.tensor_quant(x, amax, bits, unsigned, narrow)
    expected = reference.codes(x.numpy(), amax, bits, unsigned, narrow)
    np.testing.assert_array_equal(q.numpy(), expected)
    np.testing.assert_allclose(
        scale.numpy(), reference.bound_of(bits, unsigned) / np.asarray(amax), rtol=1e-6
    )
    y = tensor_quant.fake_tensor_quant(x, amax, bits, unsigned, narrow)
    expected = reference.fake_quant(x.numpy(), amax, bits, unsigned, narrow)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-6)
    # The two forms belong together.
    np.testing.assert_allclose((q / scale).numpy(), y.numpy(), rtol=1e-6, atol=1e-7)


def test_the_range_is_narrow_unless_asked_otherwise():
    x, amax = torch.tensor([-10.0, 10.0]), torch.tensor(1.0)
    assert tensor_quant.tensor_quant(x, amax)[0].tolist() == [-127, 127]
    assert tensor_quant.tensor_quant(x, amax, narrow_range=False)[0].tolist() == [-128, 127]
    assert tensor_quant.TensorQuantFunction.apply(x, amax)[0].tolist() == [-127, 127]
    bits = np.int64(8)
    assert tensor_quant.tensor_quant(x, amax, bits)[0].tolist() == [-127, 127]
    y = tensor_quant.fake_tensor_quant(x, amax, narrow_range=False)
    np.testing.assert_allclose(y.numpy(), [-128 / 127, 1], rtol=1e-6)
    assert tensor_quant.FakeTensorQuantFunction.apply(x, amax).tolist() == [-1, 1]


def test_functions_take_their_arguments_by_position():
    x, amax = example(True), torch.tensor(2.0)
    for function, twin in (
        (tensor_quant.TensorQuantFunction, tensor_quant.tensor_quant),
        (tensor_quant.FakeTensorQuantFunction, tensor_quant.fake_tensor_quant),
    ):
        assert issubclass(function, torch.autograd.Function)
        for arguments in ((), (6,), (6, True), (6, True, False)):
            first, second = function.apply(x, amax, *arguments), twin(x, amax, *arguments)
            torch.testing.assert_close(first, second, rtol=0, atol=0)
    q = tensor_quant.tensor_quant(inputs=x, amax=amax, num_bits=4, unsigned=True)[0]
    assert float(q.max()) == 15


@pytest.mark.parametrize("amax", [torch.tensor(2.0), torch.tensor([[[0.5]], [[1.0]], [[9.0]]])])
@pytest.mark.parametrize("unsigned", [False, True])
def test_the_gradient_is_straight_through(amax, unsigned):
    weights = torch.randn(3, 4, 5)
    for function in (
        lambda x: tensor_quant.tensor_quant(x, amax, 8, unsigned)[0],
        lambda x: tensor_quant.TensorQuantFunction.apply(x, amax, 8, unsigned, True)[0],
        lambda x: tensor_quant.fake_tensor_quant(x, amax, 8, unsigned),
        lambda x: tensor_quant.FakeTensorQuantFunction.apply(x, amax, 8, unsigned, True),
        lambda x: tensor_quant.scaled_e4m3(x, amax),
        lambda x: tensor_quant.ScaledE4M3Function.apply(x, amax, 4, 3),
    ):
        x = example(unsigned)
        x[:, 0, 0] = 2.0  # the bound itself, where amax is 2
        x.requires_grad_()
        function(x).backward(weights)
        np.testing.assert_array_equal(x.grad.numpy(), weights.numpy() * inside(x, amax))


def test_no_gradient_flows_to_amax_or_from_the_scale():
    x, amax = example().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    q, scale = tensor_quant.tensor_quant(x, amax)
    assert not scale.requires_grad
    y = tensor_quant.fake_tensor_quant(x, amax) + tensor_quant.scaled_e4m3(x, amax)
    (y + q).sum().backward()
    assert amax.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    x = example(dtype=dtype).requires_grad_()
    for amax in (torch.tensor(2.5), torch.rand(3, 1, 1).to(dtype) + 1):
        q, scale = tensor_quant.tensor_quant(x, amax)
        y = tensor_quant.fake_tensor_quant(x, amax)
        assert q.dtype == scale.dtype == y.dtype == dtype
        step = amax.float() / 127
        if dtype != torch.float64:
            step = step.to(dtype).float()
        steps = x.detach().double().numpy() / step.double().numpy()
        expected = np.clip(np.rint(steps), -127, 127)
        np.testing.assert_array_equal(q.detach().double().numpy(), expected)
        expected = torch.from_numpy(expected) * step.double()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(y.detach(), expected.to(wide).to(dtype))
        bound = (127 / amax.float()).to(dtype)
        assert torch.equal(scale, bound)
        (q + y).sum().backward()
        assert x.grad.dtype == dtype
        x.grad = None
    # A 0-d amax is compared in float32: in float16 these would be equal.
    if dtype == torch.float16:
        above = torch.tensor([2.0], dtype=dtype, requires_grad=True)
        tensor_quant.fake_tensor_quant(above, torch.tensor(1.9999)).sum().backward()
        assert above.grad.tolist() == [0]


def test_codes_that_half_precision_cannot_hold_are_float32():
    x = torch.tensor([1.0], dtype=torch.float16)
    assert tensor_quant.tensor_quant(x, 1.0, 14)[0].dtype == torch.float32
    assert tensor_quant.tensor_quant(x, 1.0, 14)[0].tolist() == [8191]


@pytest.mark.parametrize("tiny", [0.0, 2.0**-24, 1e-30])
def test_an_amax_of_about_zero(tiny):
    x = torch.tensor([[1.0, tiny, -3.0], [1.0, 0.25, -3.0]])
    amax = torch.tensor([[tiny], [0.5]])
    q, scale = tensor_quant.tensor_quant(x, amax)
    assert q.tolist() == [[0, 0, 0], [127, 64, -127]]
    assert scale.tolist() == [[1.0], [254.0]]
    y = tensor_quant.fake_tensor_quant(x, amax)
    np.testing.assert_allclose(y.numpy(), [[0, 0, 0], [0.5, 64 / 254, -0.5]], rtol=1e-6)
    assert tensor_quant.tensor_quant(x, torch.tensor(tiny))[1].tolist() == 1
    # Above that limit it is a range like any other.
    assert tensor_quant.tensor_quant(x, torch.tensor(2.0**-23))[0].tolist()[0][0] == 127
    half, scale = tensor_quant.tensor_quant(x.half(), torch.tensor(tiny))
    assert half.abs().sum() == 0
    assert scale == 1


def affine(x, low, high, bits):
    scale = np.float32(np.float32(high) - np.float32(low)) / np.float32(2**bits - 1)
    zero_point = -np.rint(np.float32(low) / scale)
    q = np.clip(np.rint(x / scale) + zero_point, 0, 2**bits - 1)
    return (q - zero_point) * scale


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 2.0), (0.0, 2.0), (-3.0, 0.0), (-0.37, 0.91), (1.0, 2.0), (-4.0, -3.0)]
)
def test_affine_equals_numpy(bits, low, high):
    x = torch.cat([torch.randn(200) * 3, torch.tensor([low, high, 0.0])]).requires_grad_()
    expected = affine(x.detach().numpy(), low, high, bits)
    arguments = torch.tensor(low), torch.tensor([high]), bits
    for y in (
        tensor_quant.fake_affine_tensor_quant(x, *arguments),
        tensor_quant.fake_affine_tensor_quant(x, low, high, num_bits=bits),
        tensor_quant.FakeAffineTensorQuantFunction.apply(x, *arguments),
    ):
        np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
        assert len(y.unique()) <= 2**bits
        x.grad = None
        y.sum().backward()
        passed = (x.detach() >= low) & (x.detach() <= high)
        assert torch.equal(x.grad, passed.float())
    if low <= 0 <= high:
        assert y[-1].item() == 0


def test_affine_default_is_eight_bits_and_keeps_the_dtype():
    x = example(dtype=torch.float16).requires_grad_()
    y = tensor_quant.fake_affine_tensor_quant(x, -1.0, 2.0)
    expected = affine(x.detach().float().numpy(), -1.0, 2.0, 8).astype(np.float16)
    np.testing.assert_array_equal(y.detach().numpy(), expected)
    y.sum().backward()
    assert x.grad.dtype == torch.float16


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_affine_range_of_one_value(value):
    y = tensor_quant.fake_affine_tensor_quant(torch.randn(9), value, value)
    assert y.tolist() == [value] * 9


def e4m3(x, amax):
    """The nearest of the OCP E4M3 values, in float64; ties to the even mantissa."""
    exponents, mantissas = np.meshgrid(np.arange(16), np.arange(8), indexing="ij")
    values = np.where(
        exponents == 0, mantissas / 8 * 2.0**-6, (1 + mantissas / 8) * 2.0 ** (exponents - 7)
    ).ravel()[:-1]
    scale = np.float32(amax) / np.float32(448)
    steps = np.clip(np.abs(x.astype(np.float32) / scale), 0, 448)[..., None].astype(np.float64)
    odd = np.arange(127) % 2
    nearest = np.lexsort((odd + 0 * steps, np.abs(steps - values)), axis=-1)[..., 0]
    return np.sign(x) * values[nearest] * scale


def test_e4m3_equals_numpy():
    x = torch.cat([torch.randn(500) * 3, torch.randn(500) * 1e-2, torch.zeros(2)])
    for amax in (1.0, 7.3):
        y = tensor_quant.scaled_e4m3(x, torch.tensor(amax), 4, 3)
        np.testing.assert_allclose(y.numpy(), e4m3(x.numpy(), amax), rtol=1e-6, atol=1e-9)
    exact = tensor_quant.scaled_e4m3(x * 100, None).numpy()
    np.testing.assert_allclose(exact, e4m3(x.numpy() * np.float32(100), 448.0), rtol=1e-6)
    assert tensor_quant.scaled_e4m3(x, 0.0).abs().sum() == 0


def test_e4m3_gradient_without_amax():
    x = torch.tensor([447.0, 449.0], requires_grad=True)
    tensor_quant.ScaledE4M3Function.apply(x, None).sum().backward()
    assert x.grad.tolist() == [1, 0]


@pytest.mark.parametrize(("E", "M"), [(5, 2), (2, 1)])
def test_other_floating_point_formats_are_refused(E, M):
    with pytest.raises(TypeError, match=f"E={E}, M={M}"):
        tensor_quant.scaled_e4m3(torch.ones(2), torch.tensor(1.0), E, M)


BOTH = [tensor_quant.tensor_quant, tensor_quant.fake_tensor_quant]


def test_unsigned_codes_refuse_negative_values():
    x = torch.tensor([1.0, -0.5])
    with pytest.raises(TypeError, match=r"Negative values encountered.*-0\.5"):
        tensor_quant.tensor_quant(x, torch.tensor(1.0), 8, True)
    with pytest.raises(TypeError, match="Negative values encountered"):
        tensor_quant.TensorQuantFunction.apply(x, torch.tensor(1.0), 8, True)
    assert tensor_quant.fake_tensor_quant(x, torch.tensor(1.0), 8, True).tolist() == [1, 0]
    assert tensor_quant.tensor_quant(x[:0], 1.0, unsigned=True)[0].shape == (0,)


def test_a_scale_beyond_float16_is_refused():
    x = torch.tensor([1e-3], dtype=torch.float16)
    with pytest.raises(ValueError, match="scale is too large for FP16"):
        tensor_quant.tensor_quant(x, torch.tensor(127 / 65600))
    assert tensor_quant.tensor_quant(x, torch.tensor(127 / 65500))[1].dtype == torch.float16
    with pytest.raises(ValueError, match="scale is too large for FP16"):
        tensor_quant.tensor_quant(x.expand(2), torch.tensor([1.0, 1e-4]))
    tensor_quant.tensor_quant(x.float(), torch.tensor(1e-4))
    tensor_quant.fake_tensor_quant(x, torch.tensor(1e-4))


@pytest.mark.parametrize("function", [*BOTH, tensor_quant.scaled_e4m3])
def test_a_bad_amax_is_refused(function):
    x = torch.ones(3, 4)
    for shape in ((3,), (5, 1), (1, 3, 4), (2, 3, 4), (0,)):
        with pytest.raises(ValueError, match=r"amax of shape .* does not broadcast to .*\(3, 4\)"):
            function(x, torch.ones(shape))
    for bad, shown in ((-1.0, "-1"), (float("nan"), "nan"), (float("inf"), "inf")):
        with pytest.raises(ValueError, match=f"amax must be finite and >= 0, got {shown}"):
            function(x, torch.tensor([1.0, 1.0, 1.0, bad]))
    with pytest.raises(TypeError, match="floating point"):
        function(x.long(), torch.tensor(1.0))


def test_a_bad_affine_range_is_refused():
    x = torch.ones(3, 4)
    function = tensor_quant.fake_affine_tensor_quant
    with pytest.raises(ValueError, match=r"min_range=2 is above max_range=1"):
        function(x, 2.0, 1.0)
    with pytest.raises(ValueError, match=r"max_range must be one value.*\(4,\)"):
        function(x, 0.0, torch.ones(4))
    with pytest.raises(ValueError, match="min_range must be finite, got -inf"):
        function(x, -torch.inf, 1.0)
    with pytest.raises(TypeError, match="floating point"):
        function(x.int(), 0.0, 1.0)


@pytest.mark.parametrize("function", [*BOTH, tensor_quant.fake_affine_tensor_quant])
def test_bad_widths_are_refused(function):
    arguments = (torch.ones(2), 0.0, 1.0) if "affine" in function.__name__ else (torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="num_bits=1 is out of range"):
        function(*arguments, 1)
    with pytest.raises(TypeError, match="use scaled_e4m3"):
        function(*arguments, (4, 3))
    with pytest.raises(TypeError, match="num_bits must be"):
        function(*arguments, "8")


class FakeQuantizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("per_channel", torch.tensor([[1.0], [2.0]]))
        self.register_buffer("per_tensor", torch.tensor(1.5))

    def forward(self, x):
        y = tensor_quant.fake_tensor_quant(x, self.per_channel)
        y = tensor_quant.FakeTensorQuantFunction.apply(y, self.per_tensor, 8, False, False)
        return tensor_quant.scaled_e4m3(y, self.per_tensor)


@pytest.mark.parametrize("dynamo", [True, False])
def test_an_export_holds_qdq_pairs(dynamo, capsys, tmp_path):
    x, model, file = torch.randn(3, 2, 4), FakeQuantizes().eval(), tmp_path / "m.onnx"
    torch.onnx.export(model, (x,), file, dynamo=dynamo, opset_version=19)
    graph = onnx.load(file).graph
    computing = {"Div", "Mul", "Where", "ReduceMax", "TopK"}
    assert not computing & {node.op_type for node in graph.node}
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 3
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_array_equal(y, model(x).numpy())


def test_compiled_code_gives_the_same():
    def quantizes(x, amax):
        y = tensor_quant.fake_tensor_quant(x, amax) + tensor_quant.scaled_e4m3(x, amax)
        return y + tensor_quant.fake_affine_tensor_quant(x, -amax, amax)

    x = example().requires_grad_()
    compiled = torch.compile(quantizes, backend="eager", fullgraph=True)
    y = compiled(x, torch.tensor(2.0))
    assert torch.equal(y, quantizes(x, torch.tensor(2.0)))
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), 3 * inside(x, 2.0))


def test_the_names_are_there():
    assert all(hasattr(tensor_quant, name) for name in tensor_quant.__all__)
    assert tensor_quant.QuantDescriptor is QuantDescriptor
    assert tensor_quant.ScaledQuantDescriptor is QuantDescriptor
    for name in ("TensorQuant", "FakeTensorQuant", "FakeAffineTensorQuant", "ScaledE4M3"):
        assert getattr(tensor_quant, f"{name}Function") is getattr(
            quant_functions, f"{name}Function"
        )
    for dims in (1, 2, 3):
        weight = getattr(tensor_quant, f"QUANT_DESC_8BIT_CONV{dims}D_WEIGHT_PER_CHANNEL")
        assert weight.axis == 0
        weight = getattr(tensor_quant, f"QUANT_DESC_8BIT_CONVTRANSPOSE{dims}D_WEIGHT_PER_CHANNEL")
        assert weight.axis == 1
