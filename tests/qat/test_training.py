"""Learned and moving ranges beside what training loops use."""

import copy

import pytest
import torch
from qat_models import images, labels, network, ranges, train
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from pytorch_quant import qat, quantize


def learning(method="lsq", frozen_norm=True):
    model = network()
    qat.learn_ranges(model, method)
    return qat.freeze_batchnorm(model) if frozen_norm else model


def gradients(model, run=None, x=None):
    model.zero_grad()
    x = images().requires_grad_() if x is None else x
    cross_entropy((run or model)(x), labels(len(x))).backward()
    return [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_autocast(dtype, method):
    model = learning(method)
    wanted = gradients(model)

    def run(x):
        with torch.autocast("cpu", dtype):
            return model(x).float()

    found = gradients(model, run)
    for got, exact in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), 0) > 0.98 or (
            got - exact
        ).norm() < 0.2 * max(g.norm() for g in wanted)
    losses = train(model, torch.optim.Adam(model.parameters(), lr=5e-3), 8, run)
    assert torch.isfinite(torch.stack(losses)).all() and losses[-1] < losses[0]


def test_grad_scaler_unscales_ranges_and_skips_what_overflows():
    model = learning()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    wanted = gradients(model)[1:]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for overflows in (False, True):
        held = ranges(model)
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(images()), labels())).backward()
        if overflows:
            model[0]._input_quantizer._amax.grad.fill_(float("inf"))
        scaler.unscale_(optimizer)
        if not overflows:
            for p, grad in zip(model.parameters(), wanted, strict=True):
                torch.testing.assert_close(p.grad, grad)
        scaler.step(optimizer)
        scaler.update()
        kept = all(torch.equal(amax, held[name]) for name, amax in ranges(model).items())
        assert kept == overflows
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_gradients_accumulate_to_those_of_the_whole_batch(method):
    model = learning(method)
    wanted = gradients(model)[1:]
    model.zero_grad()
    for part, target in zip(images().split(2), labels().split(2), strict=True):
        (cross_entropy(model(part), target) / 4).backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", ["module", "closure", "parts"])
def test_checkpointing_gives_the_same_gradients(form, reentrant):
    model = learning(frozen_norm=False)
    state = copy.deepcopy(model.state_dict())
    qat.quantization_dropout(model, 0.3)

    def run(x):
        torch.manual_seed(3)
        if form == "module":
            return checkpoint(model, x, use_reentrant=reentrant)
        if form == "closure":
            return checkpoint(lambda y: model[3:](model[:3](y)), x, use_reentrant=reentrant)
        for part in (model[:3], model[3:]):
            x = checkpoint(part, x, use_reentrant=reentrant)
        return x

    def plain(x):
        torch.manual_seed(3)
        return model(x)

    wanted = gradients(model, plain)
    model.load_state_dict(state)
    found = gradients(model, run)
    for got, exact in zip(found, wanted, strict=True):
        assert torch.equal(got, exact)


class Residual(nn.Module):
    def __init__(self, form, reentrant):
        super().__init__()
        self.conv, self.form, self.reentrant = nn.Conv2d(16, 16, 3, padding=1), form, reentrant

    def block(self, x):
        return self.conv(x) + x

    def forward(self, x):
        if self.form == "method" and self.training:
            return checkpoint(self.block, x, use_reentrant=self.reentrant).flatten(1)
        if self.form == "closure" and self.training:
            return checkpoint(lambda y: self.conv(y) + y, x, use_reentrant=self.reentrant).flatten(
                1
            )
        return self.block(x).flatten(1)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", ["method", "closure"])
def test_a_recomputation_that_would_not_see_the_quantizers_is_an_error(form, reentrant):
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    model = quantize(Residual(form, reentrant).eval(), example_inputs=x.detach())
    qat.update_ranges(model)
    model.train()
    with pytest.raises(RuntimeError, match=r"add#0 is in a part .*checkpoint the whole module"):
        model(x)
    # The whole module may be checkpointed.
    model.form = "none"
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None


def test_averaged_models_average_the_ranges():
    model = learning()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(qat.parameter_groups(model, lr=1e-2, range_lr=1e-3))
    averaged.update_parameters(model)
    wanted = ranges(model)
    for _ in range(2):
        train(model, optimizer)
        averaged.update_parameters(model)
        wanted = {name: (amax + ranges(model)[name]) / 2 for name, amax in wanted.items()}
    found = ranges(averaged.module)
    for name, amax in wanted.items():
        torch.testing.assert_close(found[name], amax)
    assert not torch.equal(found["0._input_quantizer"], ranges(model)["0._input_quantizer"])
    plain = network(calibrated=False)
    plain.load_state_dict(averaged.module.state_dict())
    assert torch.equal(plain.eval()(images()), averaged.eval()(images()))


def test_averaged_models_take_moving_ranges_over():
    model = network()
    qat.update_ranges(model, 0.5)
    averaged = AveragedModel(model)
    model(images() * 5)
    averaged.update_parameters(model)
    name = "0._input_quantizer"
    assert torch.equal(ranges(averaged.module)[name], ranges(model)[name])


class Task(nn.Module):
    """What a trainer such as Lightning's calls."""

    def __init__(self):
        super().__init__()
        self.model = network()
        self.schedule = qat.QATSchedule(self.model, 6, ranges="lsq")

    def training_step(self, batch, index):
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(qat.parameter_groups(self, lr=1e-2, weight_decay=1e-2))


def test_a_module_with_a_training_step():
    task = Task()
    optimizer = task.configure_optimizers()
    losses = []
    for index in range(6):
        loss = task.training_step((images(), labels()), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.schedule.step(optimizer)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [g["name"] for g in optimizer.param_groups] == ["weights", "norm_and_bias", "ranges"]
