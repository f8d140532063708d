import numpy as np
import onnx_runs
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from pytorch_quant import fake_quant
from pytorch_quant.axes import amax_shape
from pytorch_quant.formats import make_format

MILLION = 1_000_000


@st.composite
def quantizations(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)
    amax = np.abs(rng.standard_normal(amax_shape(shape, axis)) * np.abs(x).max())
    amax = np.where(rng.random(amax.shape) < 0.1, 0, amax).astype(np.float32)
    bits = draw(st.integers(2, 16))
    unsigned, narrow = draw(st.booleans()), draw(st.booleans())
    return x, amax, bits, unsigned, narrow and not unsigned


@given(quantizations())
def test_codes_and_values_equal_numpy(case):
    x, amax, bits, unsigned, narrow = case
    fmt = make_format(bits, unsigned, narrow)
    scale = fake_quant.compute_scale(torch.from_numpy(amax), fmt)
    q = fake_quant.quantize_to_codes(torch.from_numpy(x), scale, fmt)
    np.testing.assert_array_equal(q.numpy(), reference.codes(x, amax, bits, unsigned, narrow))
    y = fake_quant.fake_quantize(torch.from_numpy(x), torch.from_numpy(amax), fmt)
    expected = reference.fake_quant(x, amax, bits, unsigned, narrow)
    np.testing.assert_array_equal(y.numpy(), expected)
    np.testing.assert_array_equal(fake_quant.dequantize(q, scale).numpy(), expected)


@given(quantizations(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_computed_in_float32_with_the_stored_scale(case, dtype):
    values, amax, bits, unsigned, narrow = case
    x = torch.from_numpy(np.clip(values, -6e4, 6e4)).to(dtype)
    y = fake_quant.fake_quantize(x, torch.from_numpy(amax), make_format(bits, unsigned, narrow))
    assert y.dtype == dtype
    bound = reference.bound_of(bits, unsigned)
    scale = torch.from_numpy(np.asarray(amax / np.float32(bound), np.float32)).to(dtype)
    if dtype == torch.float16:
        scale = torch.where(torch.from_numpy(amax) > 0, scale.clamp(2.0**-24, 65504.0), scale)
    scale = scale.float().numpy()
    # The reference divides amax by the bound: hand it the amax of the stored scale.
    low = 0 if unsigned else -bound if narrow else -bound - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.clip(np.rint(x.float().numpy() / scale), low, bound)
    expected = np.where(scale == 0, np.float32(0), q * scale)
    assert torch.equal(y, torch.from_numpy(expected.astype(np.float32)).to(dtype))


def awkward_values(amax: float, dtype=np.float32) -> np.ndarray:
    """A million values and more: random at several sizes, exact ties, codes, infinities, zeros."""
    rng = np.random.default_rng(7)
    scale = np.float32(amax) / np.float32(127)
    with np.errstate(over="ignore"):
        random = rng.standard_normal(MILLION) * amax * 10.0 ** rng.uniform(-4, 2, MILLION)
        ties = (np.arange(-300, 300) + 0.5).astype(np.float32) * scale
        near = np.concatenate([np.nextafter(ties, np.float32(s)) for s in (-np.inf, np.inf)])
        edges = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38])
        return np.concatenate([random, ties, near, edges]).astype(dtype)


STORAGES = [(8, False), (8, True), (16, False), (16, True), (4, False), (4, True)]
TYPES = {
    (8, False): TensorProto.INT8,
    (8, True): TensorProto.UINT8,
    (16, False): TensorProto.INT16,
    (16, True): TensorProto.UINT16,
    (4, False): TensorProto.INT4,
    (4, True): TensorProto.UINT4,
}


@pytest.mark.parametrize(("bits", "unsigned"), STORAGES)
@pytest.mark.parametrize("amax", [2.64, 127.0, 1e-3, 1e20, 1e-30])
def test_codes_equal_onnx_runtime_on_a_million_values(bits, unsigned, amax):
    x = awkward_values(amax)
    if bits == 4:
        # Two codes share a byte.
        x = x[: len(x) // 2 * 2]
    fmt = make_format(bits, unsigned)
    scale = fake_quant.compute_scale(torch.tensor(amax), fmt)
    (expected,) = onnx_runs.run(
        onnx_runs.quantize_model(scale.numpy(), None, TYPES[bits, unsigned]), x
    )
    got = fake_quant.quantize_to_codes(torch.from_numpy(x), scale, fmt).numpy()
    assert np.array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("amax", [2.64, 100.0, 3e-4])
def test_float16_codes_equal_onnx_runtime_on_a_million_values(unsigned, amax):
    x = awkward_values(amax, np.float16)
    fmt = make_format(8, unsigned)
    scale = fake_quant.compute_scale(torch.tensor(amax), fmt, torch.float16)
    model = onnx_runs.quantize_model(
        scale.numpy().astype(np.float16), None, TYPES[8, unsigned], TensorProto.FLOAT16
    )
    (expected,) = onnx_runs.run(model, x)
    expected = expected.astype(np.float32)
    got = fake_quant.quantize_to_codes(torch.from_numpy(x), scale, fmt).numpy()
    # Its float16 kernel converts to int32 before it saturates, and wraps on x86. The
    # specification says saturate.
    steps = x.astype(np.float64) / scale.item()
    beyond = np.abs(steps) >= 2**31
    assert np.all(got[beyond] == np.where(steps[beyond] > 0, fmt.qmax, fmt.qmin))
    assert beyond.mean() < 0.01
    if onnx_runs.OLD_KERNELS:
        assert np.abs(got[~beyond] - expected[~beyond]).max() <= 1
    else:
        assert np.array_equal(got[~beyond], expected[~beyond])


@pytest.mark.parametrize("amax", [3e-4, 1.0, 100.0])
def test_every_float16_value(amax):
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = x[~np.isnan(x)]
    fmt = make_format(8)
    scale = fake_quant.compute_scale(torch.tensor(amax), fmt, torch.float16)
    got = fake_quant.quantize_to_codes(torch.from_numpy(x), scale, fmt).numpy()
    exact = x.astype(np.float64) / scale.item()
    single = (x.astype(np.float32) / scale.numpy()).astype(np.float64)
    assert np.abs(got - np.clip(exact, -128, 127)).max() <= 0.5 + 1e-5
    assert np.array_equal(got, np.rint(np.clip(single, -128, 127)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_codes_equal_onnx_runtime_on_a_million_values(axis):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((64, 125, 128)) * 3).astype(np.float32)
    amax = rng.uniform(0.1, 8, amax_shape(x.shape, axis)).astype(np.float32)
    fmt = make_format(8)
    scale = fake_quant.compute_scale(torch.from_numpy(amax), fmt)
    model = onnx_runs.quantize_model(scale.numpy().reshape(-1), axis, TensorProto.INT8)
    (expected,) = onnx_runs.run(model, x)
    got = fake_quant.quantize_to_codes(torch.from_numpy(x), scale, fmt).numpy()
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(("bits", "unsigned"), STORAGES)
@pytest.mark.parametrize("amax", [2.64, 1e-3])
def test_codes_equal_the_reference_evaluator_on_a_million_values(bits, unsigned, amax):
    fmt = make_format(bits, unsigned)
    scale = fake_quant.compute_scale(torch.tensor(amax), fmt)
    x = awkward_values(amax)
    # The reference converts to int32 before it saturates.
    with np.errstate(over="ignore"):
        x = x[np.abs(x / scale.numpy()) < 2**31]
    assert len(x) >= MILLION
    model = onnx_runs.quantize_model(scale.numpy(), None, TYPES[bits, unsigned])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    got = fake_quant.quantize_to_codes(torch.from_numpy(x), scale, fmt).numpy()
    assert np.array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("amax", [448.0, 2.64, 1e-3])
def test_e4m3_codes_equal_onnx_runtime_on_a_million_values(amax):
    fmt = make_format((4, 3))
    scale = fake_quant.compute_scale(torch.tensor(amax), fmt)
    x = awkward_values(amax)
    model = onnx_runs.quantize_model(scale.numpy(), None, TensorProto.FLOAT8E4M3FN)
    (expected,) = onnx_runs.run(model, x)
    got = fake_quant.quantize_to_codes(torch.from_numpy(x), scale, fmt).numpy()
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_other_dtypes_are_refused(dtype):
    x = torch.ones(4).to(dtype)
    told = f"takes float32, float64, float16, bfloat16 tensors, got {dtype}"
    for call in (fake_quant.fake_quantize, fake_quant.quantize):
        with pytest.raises(TypeError, match=told):
            call(x, torch.tensor(1.0), make_format(8))
    with pytest.raises(TypeError, match=told):
        fake_quant.fake_quantize_dynamic(x)


def test_zero_range_gives_zero_even_at_infinity():
    x = torch.tensor([0.0, 1.0, -torch.inf, torch.inf])
    fmt = make_format(8)
    assert fake_quant.fake_quantize(x, torch.tensor(0.0), fmt).abs().tolist() == [0.0] * 4
    assert fake_quant.quantize_to_codes(x, torch.tensor(0.0), fmt).tolist() == [0.0] * 4


def test_nan_stays_nan():
    assert fake_quant.fake_quantize(
        torch.tensor([torch.nan]), torch.tensor(1.0), make_format(8)
    ).isnan()


@given(quantizations())
def test_gradient_passes_inside_the_range_alone(case):
    x, amax, bits, unsigned, narrow = case
    leaf = torch.from_numpy(x).requires_grad_()
    y = fake_quant.fake_quantize(leaf, torch.from_numpy(amax), make_format(bits, unsigned, narrow))
    grad = torch.randn(y.shape)
    y.backward(grad)
    expected = np.where(np.abs(x) <= amax, grad.numpy(), 0)
    np.testing.assert_array_equal(leaf.grad.numpy(), expected)


def test_float64_is_computed_in_float64():
    x = torch.tensor([0.1, 0.5], dtype=torch.float64)
    y = fake_quant.fake_quantize(x, torch.tensor(1.0), make_format(16))
    assert y.dtype == torch.float64


def test_integer_form():
    x = torch.tensor([-3.0, 0.26, 1.05, 9.0])
    q, scale = fake_quant.quantize(x, torch.tensor(2.0), make_format(4))
    assert scale == torch.tensor(2.0) / 7
    assert q.tolist() == reference.codes(x.numpy(), 2.0, 4).tolist() == [-8, 1, 4, 7]


@pytest.mark.parametrize(
    ("dtype", "bits", "kept"),
    [
        (torch.float16, 8, True),
        (torch.float16, 12, True),
        (torch.float16, 13, False),
        (torch.bfloat16, 8, True),
        (torch.bfloat16, 10, False),
    ],
)
def test_integer_form_keeps_the_dtype_that_holds_the_codes(dtype, bits, kept):
    q, _ = fake_quant.quantize(
        torch.tensor([2.0], dtype=dtype), torch.tensor(1.0), make_format(bits)
    )
    assert q.dtype == (dtype if kept else torch.float32)
    assert q.item() == 2 ** (bits - 1) - 1


def test_integer_form_refuses_negatives_when_unsigned():
    with pytest.raises(ValueError, match=r"Negative values encountered.*minimum -0\.5"):
        fake_quant.quantize(torch.tensor([1.0, -0.5]), torch.tensor(1.0), make_format(8, True))


@given(st.integers(0, 2**32 - 1), st.floats(-5, 5), st.floats(1e-3, 1e3))
def test_dynamic_form_equals_onnx_runtime(seed, mean, spread):
    rng = np.random.default_rng(seed)
    x = ((rng.standard_normal(1000) + mean) * spread).astype(np.float32)
    expected = onnx_runs.run(onnx_runs.dynamic_quantize_model(), x)
    got = [t.numpy() for t in fake_quant.dynamic_quantize(torch.from_numpy(x))]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs.astype(np.float32))


@pytest.mark.parametrize(
    "x", [np.zeros(4), np.full(4, 3.0), np.full(4, -3.0), np.array([0, 1e-38])]
)
def test_dynamic_form_of_particular_tensors(x):
    x = x.astype(np.float32)
    expected = onnx_runs.run(onnx_runs.dynamic_quantize_model(), x)
    got = fake_quant.dynamic_quantize(torch.from_numpy(x))
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.astype(np.float32))


def test_dynamic_form_passes_all_gradients():
    x = torch.randn(8, requires_grad=True)
    y = fake_quant.fake_quantize_dynamic(x)
    y.backward(torch.arange(8.0))
    assert torch.equal(x.grad, torch.arange(8.0))
    assert fake_quant.fake_quantize_dynamic(torch.empty(0)).shape == (0,)


class Half(torch.nn.Module):
    def forward(self, x, amax):
        return fake_quant.fake_quantize(x, amax, make_format(8)) * 0.5


def test_one_node_survives_torch_export():
    x, amax = torch.randn(2, 3, requires_grad=True), torch.tensor(1.0)
    program = torch.export.export(Half(), (x, amax))
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "pytorch_quant.fake_quantize.default" in called
    y = program.module()(x, amax)
    assert torch.equal(y, Half()(x, amax))
    y.sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= 1.0) * 0.5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operator_passes_torch_opcheck():
    x = torch.randn(4, 3, requires_grad=True)
    amax = torch.rand(4, 1)
    scale = amax / 127
    torch.library.opcheck(torch.ops.pytorch_quant.fake_quantize, (x, amax, scale, "int8"))


def test_vmap_and_compile_agree_with_eager():
    fmt = make_format(8)
    x, amax = torch.randn(5, 7), torch.tensor(1.5)
    eager = fake_quant.fake_quantize(x, amax, fmt)
    mapped = torch.vmap(lambda row: fake_quant.fake_quantize(row, amax, fmt))(x)
    assert torch.equal(eager, mapped)
    compiled = torch.compile(
        lambda x, a: fake_quant.fake_quantize(x, a, fmt), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(eager, compiled(x, amax))
