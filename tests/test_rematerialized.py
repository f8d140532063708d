import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pytorch_quant import INT4_WEIGHT_ONLY, QuantDescriptor, blockwise, calibrate, qat, quantize
from pytorch_quant import nn as quant_nn
from pytorch_quant.fake_quant import fake_quantize
from pytorch_quant.formats import make_format

INT8 = make_format(8)


def network():
    model = nn.Sequential(
        quant_nn.QuantConv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        quant_nn.QuantConv2d(8, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        quant_nn.QuantLinear(8 * 64, 5),
    )
    calibrate(model, [images()], progress=False)
    return model.train()


def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def gradients(model, x, again, forward=None):
    """Those of all parameters and of the input."""
    torch.manual_seed(0)
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    if again:
        with qat.rematerialize():
            loss = (forward or model)(x).float().square().mean()
    else:
        loss = (forward or model)(x).float().square().mean()
    loss.backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(model, x, forward=None):
    expected, got = (gradients(model, x, again, forward) for again in (False, True))
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def kept_bytes(run):
    """Bytes that are allocated by `run` and still there after it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    assert result is not None
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.fixture
def recomputed(monkeypatch):
    """How often something is computed again."""
    from pytorch_quant import rematerialized

    seen = []
    tensor = rematerialized._Note.tensor
    monkeypatch.setattr(
        rematerialized._Note, "tensor", lambda self: [seen.append(1), tensor(self)][1]
    )
    return seen


@pytest.mark.parametrize("method", [None, "lsq", "pact"])
def test_gradients_are_the_same(method, recomputed):
    model = network()
    if method:
        qat.learn_ranges(model, method)
    same(model, images())
    # The input and the weight of each layer.
    assert len(recomputed) == 6


def test_tensors_over_several_blocks(monkeypatch, recomputed):
    monkeypatch.setattr(blockwise, "VALUES_PER_BLOCK", 2**7)
    model = network().to(memory_format=torch.channels_last)
    same(model, images().contiguous(memory_format=torch.channels_last))
    assert len(recomputed) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    def forward(x):
        with torch.autocast("cpu", dtype):
            return model(x)

    model = network()
    same(model, images(), forward)


def test_half_precision():
    model = network().bfloat16()
    same(model, images().bfloat16())


def test_weights_in_blocks_and_sequences():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4))
    quantize(model, {"*": INT4_WEIGHT_ONLY}, example_inputs=torch.randn(2, 5, 128))
    calibrate(model, [torch.randn(2, 5, 128)], progress=False)
    same(model, torch.randn(2, 5, 128))


@pytest.mark.parametrize("layer", [quant_nn.QuantLSTM, quant_nn.QuantLSTMCell])
def test_recurrent_layers(layer):
    model = layer(6, 5)
    x = torch.randn(3, 6) if layer is quant_nn.QuantLSTMCell else torch.randn(4, 3, 6)
    calibrate(model, [x], progress=False)
    same(model, x, lambda x: model(x)[0])


def test_moving_ranges():
    def forward(x):
        with qat.update_ranges(model, 0.5):
            return model(x)

    model = network()
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def once(again):
        model.load_state_dict(start)
        return gradients(model, 2 * images(), again, forward)

    for one, other in zip(once(True), once(False), strict=True):
        assert torch.equal(one, other)


def test_dropped_quantization_is_not_computed_again(recomputed):
    model = network()
    with qat.quantization_dropout(model, 0.5):
        same(model, images())
    # The weights alone: what is random cannot be computed again.
    assert len(recomputed) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_beside_checkpoints(reentrant):
    model = network()
    front, back = model[:3], model[3:]
    # The statistics of batch norm are counted twice.
    qat.freeze_batchnorm(model)
    same(model, images(), lambda x: back(checkpoint(front, x, use_reentrant=reentrant)))


def test_second_derivatives():
    def second(again):
        x = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).requires_grad_()
        with qat.rematerialize() if again else torch.enable_grad():
            y = fake_quantize(x, torch.tensor(1.0), INT8)
            (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    assert second(True).abs().sum() > 0
    assert torch.equal(second(True), second(False))


@pytest.mark.slow
def test_a_compiled_model():
    compiled = torch.compile(network(), backend="aot_eager", fullgraph=True)
    same(compiled, images())


def test_memory_of_residual_blocks():
    """Under 1.25 times that of the float model, which has no copies of activations or weights."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(16, 16, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(16)
            self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
            self.norm2 = nn.BatchNorm2d(16)

        def forward(self, x):
            y = torch.relu(self.norm(self.first(x)))
            return torch.relu(self.norm2(self.second(y)) + x)

    model = nn.Sequential(*(Block() for _ in range(3)))
    x = torch.randn(4, 16, 32, 32)
    plain = kept_bytes(lambda: model(x))
    quantize(model, example_inputs=x)
    calibrate(model, [x], progress=False)
    model.train()

    def again():
        with qat.rematerialize():
            return model(x)

    assert plain > 4 * x.nbytes
    assert kept_bytes(lambda: model(x)) > 1.4 * plain
    assert kept_bytes(again) < 1.25 * plain


def test_nothing_outlives_the_graph():
    model = network()
    x = images()
    with qat.rematerialize():
        assert kept_bytes(lambda: [model(x).sum().backward(), model.zero_grad()]) < 1000


def test_what_was_made_and_then_changed_is_kept_as_it_is(recomputed):
    x = torch.randn(8, requires_grad=True)
    with qat.rematerialize():
        y = fake_quantize(x, torch.tensor(1.0), INT8).mul_(3.0)
        (y * y).sum().backward()
    expected = 2 * y.detach() * 3 * (x.detach().abs() <= 1)
    assert torch.equal(x.grad, expected) and not recomputed


@pytest.mark.parametrize("which", ["source", "other"])
def test_changes_in_place_are_an_error(which):
    x, other = torch.randn(8), torch.randn(8)
    weight = torch.randn(8, requires_grad=True)
    with qat.rematerialize():
        loss = (fake_quantize(x, torch.tensor(1.0), INT8) * weight).sum() + (other * weight).sum()
    (x if which == "source" else other).add_(1.0)
    with pytest.raises(
        RuntimeError, match=r"shape \(8,\).*changed in place.*version 1, expected 0"
    ):
        loss.backward()


def test_it_ends_with_the_block_and_after_an_error(recomputed):
    model = network()
    with pytest.raises(ZeroDivisionError), qat.rematerialize(), qat.rematerialize():
        raise ZeroDivisionError
    gradients(model, images(), again=False)
    assert not recomputed


def test_scopes_may_be_nested(recomputed):
    model = network()
    with qat.rematerialize():
        with qat.rematerialize():
            pass
        gradients(model, images(), again=False)
    assert len(recomputed) == 6


def test_one_thread_does_not_reach_another(recomputed):
    model = network()
    with qat.rematerialize():
        thread = threading.Thread(target=gradients, args=(model, images(), False))
        thread.start()
        thread.join()
    assert not recomputed


def test_tensors_of_inference_mode():
    quantizer = quant_nn.TensorQuantizer(QuantDescriptor(amax=1.0))
    with torch.inference_mode():
        x = torch.randn(4)
    with torch.inference_mode(), qat.rematerialize():
        inside = quantizer(x)
    with qat.rematerialize():
        assert torch.equal(quantizer(x), inside)
