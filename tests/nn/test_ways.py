"""Every way of quantizing: one reference, and `entering` says what `forward` does."""

import numpy as np
import pytest
import reference
import torch

from pytorch_quant import QuantDescriptor, TensorQuantizer
from pytorch_quant.nn.quantizer import ways

AMAX = torch.tensor([[0.5], [1.5], [0.0], [2.5]])


def made(amax=None, **fields):
    quantizer = TensorQuantizer(QuantDescriptor(**fields))
    if amax is not None:
        quantizer.amax = amax
    return quantizer


def learning(quantizer):
    quantizer.learn_range("lsq", weight=True)
    return quantizer


def torch_own(quantizer):
    quantizer.use_fb_fake_quant = True
    return quantizer


def scaled(quantizer, factor=1.5):
    quantizer.pre_quant_scale = factor
    return quantizer


def set_directly():
    quantizer = made(1.5)
    quantizer._num_bits, quantizer._fake_quant, quantizer._unsigned = 4, False, True
    return quantizer


BLOCK_AMAX = torch.rand(4 * 2, 1) + 0.5
# The way, a quantizer, and what a reference has to know: amax, bits, unsigned, narrow.
CASES = {
    "static": ("Static", lambda: made(1.5), (1.5, 8)),
    "static by channel": ("Static", lambda: made(AMAX, axis=0), (AMAX, 8)),
    "static, 4 narrow bits": ("Static", lambda: made(1.5, num_bits=4, narrow_range=True), (1.5, 4)),
    "static, unsigned": ("Static", lambda: made(1.5, unsigned=True), (1.5, 8)),
    "static, uncalibrated": ("Static", lambda: made(axis=0), (None, 8)),
    "static, scaled": ("Static", lambda: scaled(made(1.5, scale_amax=2.0)), (3.0, 8)),
    "static, clip": ("Static", lambda: made(1.5, learn_amax=True), (1.5, 8)),
    "learned": ("Learned", lambda: learning(made(AMAX + 1, axis=0)), (AMAX + 1, 8)),
    "learned per tensor": ("Learned", lambda: learning(made(1.5)), (1.5, 8)),
    "codes": ("Codes", lambda: made(AMAX, axis=0, fake_quant=False), (AMAX, 8)),
    "codes by fields": ("Codes", set_directly, (1.5, 4)),
    "torch's own": ("TorchOwn", lambda: torch_own(made(AMAX + 1, axis=0)), (AMAX + 1, 8)),
    "dynamic": ("Dynamic", lambda: made(dynamic=True), (None, 8)),
    "blocks": ("Blocks", lambda: made(BLOCK_AMAX, num_bits=4, axis=1, block_size=3), (None, 4)),
    "blocks, learned": (
        "Blocks",
        lambda: learning(made(BLOCK_AMAX, num_bits=4, axis=1, block_size=3)),
        (None, 4),
    ),
    "blocks, uncalibrated": ("Blocks", lambda: made(num_bits=4, axis=1, block_size=3), (None, 4)),
    "blocks of codes": (
        "Blocks",
        lambda: made(BLOCK_AMAX, num_bits=4, axis=1, block_size=3, fake_quant=False),
        (None, 4),
    ),
}


def expected(quantizer, x, amax, bits):
    """What the quantizer has to give, in NumPy."""
    values = x.numpy() * np.float32(1.5 if quantizer.pre_quant_scale is not None else 1.0)
    if quantizer.dynamic:
        low, high = min(values.min(), 0), max(values.max(), 0)
        scale = (high - low) / np.float32(255)
        zero_point = np.rint(-low / scale)
        return (np.clip(np.rint(values / scale) + zero_point, 0, 255) - zero_point) * scale
    if quantizer.clips:
        values = values.clip(-np.float32(amax), np.float32(amax))
    rows = values
    if quantizer.block_size is not None:
        rows = values.reshape(-1, 3)
        amax = quantizer.amax if quantizer.calibrated else None
    if amax is None:
        amax = reference.amax_of(rows, 0)
    amax = amax.numpy() if isinstance(amax, torch.Tensor) else np.float32(amax)
    form = reference.fake_quant if quantizer.fake_quant else reference.codes
    y = form(rows, amax, bits, quantizer.unsigned, quantizer.narrow_range)
    return y.reshape(values.shape)


@pytest.fixture
def x(request):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, 6, generator=generator)


@pytest.mark.parametrize(("way", "make", "told"), CASES.values(), ids=CASES)
def test_all_ways_agree_with_one_reference(way, make, told, x):
    quantizer = make()
    x = x.abs() if quantizer.unsigned else x
    assert type(ways.way_of(quantizer)).__name__ == way
    wanted = expected(quantizer, x, *told)
    with torch.no_grad():
        got = quantizer(x)
        entered = quantizer.entering(x)
        assert torch.equal(quantizer.leaving(entered), got)
        codes, scale = entered.codes(), entered.scale
        rows = (entered.as_rows(codes) - entered.zero_point) * scale
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
    real = entered.in_shape(rows) if quantizer.fake_quant else codes
    torch.testing.assert_close(real, got, rtol=1e-6, atol=1e-7)
    assert torch.equal(entered.in_shape(entered.as_rows(x)), x)
    if entered.amax is not None:
        bound = entered.format.bound
        torch.testing.assert_close(scale, entered.amax.detach() / bound, rtol=0, atol=0)


@pytest.mark.parametrize(("way", "make", "told"), CASES.values(), ids=CASES)
def test_a_range_for_once(way, make, told, x):
    quantizer = make()
    x = x.abs() if quantizer.unsigned else x
    if quantizer.dynamic:
        pytest.skip("it has no range")
    state = {key: tensor.clone() for key, tensor in quantizer.state_dict().items()}
    amax = BLOCK_AMAX * 0.5 if quantizer.block_size is not None else torch.tensor(0.25)
    with torch.no_grad():
        got = quantizer.leaving(quantizer.entering(x, amax))
    assert all(torch.equal(state[key], tensor) for key, tensor in quantizer.state_dict().items())
    if quantizer.learns and quantizer.learned_range is None:
        # It clips to the range that it has learned before; the one for once is narrower.
        quantizer.disable_clip()
    twin = TensorQuantizer(
        QuantDescriptor(
            quantizer.num_bits,
            fake_quant=quantizer.fake_quant,
            axis=quantizer.axis,
            unsigned=quantizer.unsigned,
            narrow_range=quantizer.narrow_range,
            block_size=quantizer.block_size,
            scale_amax=quantizer.scale_amax,
        )
    )
    twin.pre_quant_scale = quantizer.pre_quant_scale
    twin.set_range(amax)
    torch.testing.assert_close(got, twin(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_scale_has_the_precision_that_forward_uses(dtype, autocast, x):
    quantizer = made(AMAX, axis=0)
    x = x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, entered = quantizer(x), quantizer.entering(x)
        assert torch.equal(y, (entered.codes() * entered.scale).to(dtype))


def test_a_learned_range_gets_its_gradient_from_what_has_entered(x):
    quantizer, twin = (learning(made(AMAX + 1, axis=0)) for _ in range(2))
    quantizer(x).square().sum().backward()
    twin.leaving(twin.entering(x)).square().sum().backward()
    assert torch.equal(quantizer.learned_range.grad, twin.learned_range.grad)
    assert quantizer.learned_range.grad.abs().sum() > 0


def test_entering_does_not_move_a_range(x):
    quantizer = made(1.0)
    quantizer.follow_range(0.5)
    quantizer.entering(x)
    assert quantizer.amax == 1.0
    quantizer(x)
    assert quantizer.amax != 1.0


def test_what_it_would_do():
    quantizer = made(1.5, learn_amax=True)
    assert quantizer.quantizes and quantizer.clips and quantizer.learns_by_clip
    assert not quantizer.collects
    quantizer.enable_calib()
    assert quantizer.collects
    quantizer.disable()
    assert not (quantizer.quantizes or quantizer.clips or quantizer.collects)
    assert quantizer.learns
    quantizer.enable()
    quantizer.disable_quant()
    assert not quantizer.quantizes and quantizer.clips


@pytest.mark.parametrize("kind", ["buffer", "parameter", "clip"])
def test_set_range(kind):
    quantizer = made(1.5, learn_amax=kind == "clip")
    if kind == "parameter":
        learning(quantizer)
    held = quantizer._amax
    quantizer.set_range(torch.tensor(0.75))
    assert quantizer.amax == 0.75
    assert quantizer._amax is held
    assert isinstance(held, torch.nn.Parameter) == (kind == "parameter")
