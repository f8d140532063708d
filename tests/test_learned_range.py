"""LSQ and PACT against NumPy, written from the papers' formulas."""

import numpy as np
import pytest
import torch

from pytorch_quant.formats import IntFormat
from pytorch_quant.learned_range import learned_fake_quantize, positive
from pytorch_quant.nn.functional import clip

BITS = [(8, True), (4, True), (4, False), (2, True)]


def lsq(x, s, grad, qmin, qmax, count):
    """Esser et al. 2020, eq. 1 to 5 and section 2.2, one step size for all of x."""
    x, grad = x.astype(np.float64), grad.astype(np.float64)
    v = x / s
    y = np.round(np.clip(v, qmin, qmax)) * s
    ds = np.where(v <= qmin, qmin, np.where(v >= qmax, qmax, np.round(v) - v))
    dx = np.where((v > qmin) & (v < qmax), grad, 0)
    return y, dx, (grad * ds).sum() / np.sqrt(count * qmax)


def pact(x, alpha, grad, signed):
    """Choi et al. 2018, eq. 1 to 3."""
    above, below = x >= alpha, x <= (-alpha if signed else 0)
    dx = np.where(above | below, 0, grad)
    return dx, grad[above].sum() - (grad[below].sum() if signed else 0)


def run(x, amax, fmt, method, grad, **options):
    x = x.clone().requires_grad_()
    amax = amax.clone().requires_grad_()
    y = learned_fake_quantize(x, amax, fmt, method, **options)
    y.backward(grad)
    return y.detach(), x.grad, amax.grad


@pytest.mark.parametrize(("bits", "signed"), BITS)
@pytest.mark.parametrize("weight", [True, False])
def test_lsq_per_tensor(bits, signed, weight):
    fmt = IntFormat(bits, signed)
    x, grad = torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    # Dyadic step: some values sit on the limits themselves.
    s = 2.0**-3
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = fmt.qmax * s, fmt.qmin * s, 0.0
    amax = torch.tensor(fmt.bound * s)
    y, dx, damax = run(x, amax, fmt, "lsq", grad, weight=weight)
    count = 120 if weight else 20
    wanted = lsq(x.numpy(), s, grad.numpy(), fmt.qmin, fmt.qmax, count)
    np.testing.assert_array_equal(y, wanted[0].astype(np.float32))
    np.testing.assert_array_equal(dx, wanted[1].astype(np.float32))
    np.testing.assert_allclose(damax / fmt.bound, wanted[2], rtol=1e-5)
    assert damax.shape == ()


@pytest.mark.parametrize("axis", [0, 1])
def test_lsq_per_channel(axis):
    fmt = IntFormat(4)
    x, grad = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    shape = [n if a == axis else 1 for a, n in enumerate(x.shape)]
    s = torch.tensor([0.25, 0.125, 0.5, 0.0625][: x.shape[axis]]).reshape(shape)
    for weight in (True, False):
        y, dx, damax = run(x, s * 7, fmt, "lsq", grad, weight=weight)
        assert damax.shape == s.shape
        for i in range(x.shape[axis]):
            part, g = (t.select(axis, i).numpy() for t in (x, grad))
            # Examples are an axis of activations that the range does not run along.
            count = part.size // (1 if weight or axis == 0 else 3)
            wanted = lsq(part, float(s.flatten()[i]), g, -8, 7, count)
            np.testing.assert_array_equal(y.select(axis, i), wanted[0].astype(np.float32))
            np.testing.assert_array_equal(dx.select(axis, i), wanted[1].astype(np.float32))
            np.testing.assert_allclose(damax.flatten()[i] / 7, wanted[2], rtol=1e-5)


def test_a_step_of_sgd_moves_the_step_size_as_in_the_paper():
    fmt, s, lr = IntFormat(4), 0.11, 2e-4
    amax = torch.tensor(fmt.bound * s).requires_grad_()
    optimizer = torch.optim.SGD([amax], lr=lr)
    for _ in range(4):
        x, target = torch.randn(40), torch.randn(40)
        y = learned_fake_quantize(x, amax, fmt, "lsq", weight=True)
        optimizer.zero_grad()
        ((y - target) ** 2).sum().backward()
        optimizer.step()
        grad = 2 * (lsq(x.numpy(), s, np.zeros(40), -8, 7, 40)[0] - target.numpy())
        s -= lr * lsq(x.numpy(), s, grad, -8, 7, 40)[2]
    assert amax.item() / fmt.bound == pytest.approx(s, rel=1e-4)
    assert abs(s - 0.11) > 1e-3


@pytest.mark.parametrize(("bits", "signed"), BITS)
def test_pact(bits, signed):
    fmt = IntFormat(bits, signed)
    x, grad = torch.randn(200), torch.randn(200)
    x[0], x[1], x[2] = 0.75, -0.75, 0.0
    _, dx, dalpha = run(x, torch.tensor(0.75), fmt, "pact", grad)
    wanted = pact(x.numpy(), 0.75, grad.numpy(), signed)
    np.testing.assert_array_equal(dx, wanted[0])
    np.testing.assert_allclose(dalpha, wanted[1], rtol=1e-5)


def test_pact_per_channel():
    x, grad = torch.randn(3, 50), torch.randn(3, 50)
    alpha = torch.tensor([[0.5], [1.0], [2.0]])
    _, dx, dalpha = run(x, alpha, IntFormat(8), "pact", grad)
    for i in range(3):
        wanted = pact(x[i].numpy(), float(alpha[i]), grad[i].numpy(), True)
        np.testing.assert_array_equal(dx[i], wanted[0])
        np.testing.assert_allclose(dalpha[i, 0], wanted[1], rtol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_gradcheck_of_the_clip_that_pact_learns(signed):
    # Away from the bounds, where the clip has no derivative.
    x = torch.tensor([-3.0, -1.2, -0.3, 0.2, 0.7, 1.4, 2.5], dtype=torch.float64).requires_grad_()
    alpha = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    low = (lambda a: -a) if signed else (lambda a: a * 0)
    assert torch.autograd.gradcheck(lambda x, a: clip(x, low(a), a), (x, alpha))
    # The quantized form has the same gradient.
    _, dx, dalpha = run(
        x.detach(), alpha.detach().float(), IntFormat(8, signed), "pact", x.detach()
    )
    clip(x, low(alpha), alpha).backward(x.detach())
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dalpha, alpha.grad.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    x = torch.full((1, 4000), 2.0, dtype=dtype)
    grad = torch.full_like(x, 16.0)
    y, dx, dalpha = run(x, torch.tensor(1.0), IntFormat(8), "pact", grad)
    assert y.dtype == dx.dtype == dtype and dalpha.dtype == torch.float32
    assert dalpha == 64000


def test_without_a_gradient_of_the_range_it_is_plain_fake_quantization():
    x = torch.tensor([0.5, 1.0, 1.5], requires_grad=True)
    learned_fake_quantize(x, torch.tensor(1.0), IntFormat(8), "lsq").sum().backward()
    # LSQ would give 0 at the bound.
    assert x.grad.tolist() == [1, 1, 0]


def test_a_range_stays_positive_and_comes_back():
    value = torch.tensor([2.0, -0.5, 1e-9, -1e-9, 0.0], requires_grad=True)
    amax = positive(value, 127.0)
    assert amax[:2].tolist() == [2.0, 0.5]
    assert amax[2:].tolist() == [127 * 2.0**-24] * 3
    amax.sum().backward()
    assert value.grad.tolist() == [1, -1, 1, -1, 1]


def test_zeros_and_nothing():
    x = torch.zeros(3, 4)
    y, _, damax = run(x, torch.tensor(1e-4), IntFormat(8), "lsq", torch.ones(3, 4))
    assert not y.any() and damax == 0
    y, _, damax = run(torch.zeros(0, 4), torch.tensor(1.0), IntFormat(8), "lsq", torch.ones(0, 4))
    assert y.shape == (0, 4) and damax == 0
