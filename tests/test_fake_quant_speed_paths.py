"""The fast forms of fake quantization against NumPy: cut into blocks, one pass, in place."""

import numpy as np
import pytest
import reference
import torch

from pytorch_quant import blockwise, fake_quant
from pytorch_quant.axes import amax_shape
from pytorch_quant.formats import make_format

INT8 = make_format(8)
SHAPES = [
    ((7, 5, 11, 3), None, "contiguous"),
    ((7, 5, 11, 3), 0, "contiguous"),
    ((7, 5, 11, 3), 1, "contiguous"),
    ((7, 5, 11, 3), 3, "contiguous"),
    ((7, 5, 11, 3), (0, 2), "contiguous"),
    ((7, 5, 11, 3), None, "channels_last"),
    ((7, 5, 11, 3), 1, "channels_last"),
    ((7, 5, 11, 3), 1, "transposed"),
    ((7, 5, 11, 3), 1, "gaps"),
    ((1, 300), 1, "contiguous"),
    ((300, 1), 0, "contiguous"),
    ((300,), None, "contiguous"),
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "gaps": lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.fixture(params=[16, 100, 10**9])
def block(request, monkeypatch):
    """Values of a block: a few rows, most of a channel, more than the tensor has."""
    monkeypatch.setattr(blockwise, "VALUES_PER_BLOCK", request.param)
    return request.param


def case(shape, axis, layout, dtype=torch.float32):
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(shape) * 2).astype(np.float32)
    x.reshape(-1)[:3] = np.inf, -np.inf, 0.0
    amax = rng.uniform(0.5, 3, amax_shape(shape, axis)).astype(np.float32)
    flat = amax.reshape(-1)
    flat[-1] = 0 if flat.size > 3 else flat[-1]
    # Values at the bound, and the next ones beyond it, where the mask of the gradient changes.
    full = np.broadcast_to(amax, shape)
    for i, direction in enumerate((1.0, -1.0)):
        bound = full.reshape(-1)[20 + 2 * i] * np.float32(direction)
        x.reshape(-1)[20 + 2 * i] = bound
        bound = full.reshape(-1)[21 + 2 * i] * np.float32(direction)
        x.reshape(-1)[21 + 2 * i] = np.nextafter(bound, np.float32(np.inf * direction))
    return LAYOUTS[layout](torch.from_numpy(x).to(dtype)), torch.from_numpy(amax)


@pytest.mark.parametrize(("shape", "axis", "layout"), SHAPES)
def test_forward_and_backward_equal_numpy(block, shape, axis, layout):
    x, amax = case(shape, axis, layout)
    before = x.clone()
    leaf = x.detach().requires_grad_()
    y = fake_quant.fake_quantize(leaf, amax, INT8)
    np.testing.assert_array_equal(
        y.detach().numpy(), reference.fake_quant(x.numpy(), amax.numpy(), 8)
    )
    grad = LAYOUTS[layout](torch.randn(shape))
    (got,) = torch.autograd.grad(y, leaf, grad)
    expected = np.where(np.abs(x.numpy()) <= amax.numpy(), grad.numpy(), 0)
    np.testing.assert_array_equal(got.numpy(), expected)
    assert torch.equal(x, before), "the input was written to"
    if layout in ("contiguous", "channels_last"):
        assert y.stride() == got.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("axis", [None, 1])
def test_other_dtypes(block, dtype, axis):
    x, amax = case((7, 5, 11, 3), axis, "contiguous", dtype)
    leaf = x.detach().requires_grad_()
    y = fake_quant.fake_quantize(leaf, amax, INT8, scale_dtype=torch.float32)
    wide = x.numpy() if dtype == torch.float64 else x.float().numpy()
    scale = amax.numpy() / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.clip(np.rint(wide / scale), -128, 127)
    expected = torch.from_numpy(np.where(scale == 0, 0, codes * scale)).to(dtype)
    assert y.dtype == dtype and torch.equal(y, expected)
    grad = torch.randn(x.shape).to(dtype)
    (got,) = torch.autograd.grad(y, leaf, grad)
    inside = torch.from_numpy(np.abs(wide) <= amax.numpy())
    assert got.dtype == dtype and torch.equal(got, torch.where(inside, grad, 0))


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("fmt", [make_format((4, 3)), make_format(8, True), make_format(16)])
def test_blocks_change_nothing_in_other_formats(monkeypatch, axis, fmt):
    x, amax = case((7, 5, 11, 3), axis, "contiguous")
    whole = fake_quant.fake_quantize(x, amax, fmt)
    monkeypatch.setattr(blockwise, "VALUES_PER_BLOCK", 16)
    assert torch.equal(fake_quant.fake_quantize(x, amax, fmt), whole)


def test_nan_stays_nan_in_every_block(monkeypatch):
    monkeypatch.setattr(blockwise, "VALUES_PER_BLOCK", 16)
    x = torch.randn(50, 7)
    x[::3] = torch.nan
    y = fake_quant.fake_quantize(x, torch.rand(50, 1), INT8)
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("amax", [torch.tensor(1.0), torch.rand(7, 1, 1, 1)])
def test_gradient_that_is_broadcast(block, amax):
    x = torch.randn(7, 5, 11, 3, requires_grad=True)
    fake_quant.fake_quantize(x, amax, INT8).sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= amax).float())


@pytest.mark.parametrize("amax", [torch.tensor(1.0), torch.rand(5, 1)])
def test_infinite_gradients_outside_become_zero(amax):
    x = torch.full((5, 3), 9.0, requires_grad=True)
    fake_quant.fake_quantize(x, amax, INT8).backward(torch.full((5, 3), torch.inf))
    assert torch.equal(x.grad, torch.zeros(5, 3))


def test_range_that_is_not_finite():
    x = torch.randn(9, requires_grad=True)
    for amax, expected in ((torch.inf, 1.0), (torch.nan, 0.0)):
        grad = fake_quant.straight_through(torch.ones(9), x.detach(), torch.tensor(amax))
        assert torch.equal(grad, torch.full((9,), expected))


def test_second_derivative_by_the_gradient():
    # Of grad * mask by grad: the mask.
    x = torch.tensor([0.5, 3.0], requires_grad=True)
    grad = torch.ones(2, requires_grad=True)
    y = fake_quant.fake_quantize(x, torch.tensor(1.0), INT8)
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad)
    assert second.tolist() == [1.0, 0.0]


def test_per_sample_gradients():
    weight, batch = torch.randn(3), torch.randn(6, 3)

    def loss(w, x):
        return (fake_quant.fake_quantize(w, torch.tensor(0.5), INT8) * x).sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0))(weight, batch)
    assert torch.equal(got, torch.where(weight.abs() <= 0.5, batch, 0.0))


def test_the_backward_keeps_the_input_alone():
    x, amax = torch.randn(64, requires_grad=True), torch.tensor(1.0)
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake_quant.fake_quantize(x, amax, INT8)
    assert kept == [x.data_ptr(), amax.data_ptr()]


@pytest.mark.parametrize("axis", [None, 1])
def test_blocks_cover_every_value_once(block, axis):
    x, amax = case((7, 5, 11, 3), axis, "channels_last")
    if not blockwise.pays(x):
        assert block > x.numel()
        return
    count = torch.zeros_like(x)
    for (part,), (own,) in blockwise.blocks((count,), (amax,)):
        part.add_(1 + 0 * own)
        assert part.numel() <= max(block, 1)
    assert torch.equal(count, torch.ones_like(x))


def test_what_cannot_be_cut(monkeypatch):
    monkeypatch.setattr(blockwise, "VALUES_PER_BLOCK", 1)
    x = torch.randn(8, 8)
    assert blockwise.pays(x)
    assert not blockwise.pays(x[:, :4]), "has gaps"
    assert not blockwise.pays(x, x.t()), "another layout"
    assert not blockwise.pays(x.to("meta"))
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert not blockwise.pays(x)


@pytest.mark.gpu
def test_no_wait_for_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.cuda.get_sync_debug_mode()
    for amax in (torch.tensor(1.0), torch.rand(64, 1)):
        x, on_device = torch.randn(64, 64, device="cuda", requires_grad=True), amax.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fake_quant.fake_quantize(x, on_device, INT8).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert torch.equal(x.grad, (x.detach().abs() <= on_device).float())
