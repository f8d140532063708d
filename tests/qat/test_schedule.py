"""The usual recipe as an object."""

import math

import pytest
import torch
from qat_models import images, labels, network, ranges
from torch import nn
from torch.nn.functional import cross_entropy

from pytorch_quant import qat

INPUT = "0._input_quantizer"
RANGE_LR = 1e-3


def start(ranges="moving", steps=8, model=None, **options):
    model = network() if model is None else model
    schedule = qat.QATSchedule(model, steps, ranges=ranges, progress=False, **options)
    optimizer = torch.optim.SGD(
        qat.parameter_groups(model, lr=0.1, range_lr=RANGE_LR), momentum=0.9
    )
    return model, schedule, optimizer


def train(model, schedule, optimizer, steps, first=0):
    seen = []
    for i in range(first, first + steps):
        loss = cross_entropy(model(images(seed=i) * 2), labels(seed=i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(optimizer)
        seen.append((ranges(model)[INPUT].item(), model[1].running_mean[0].item()))
    return seen


@pytest.mark.parametrize("kind", ["moving", "lsq", "pact", "fixed"])
def test_ranges_and_batch_norm_freeze_in_their_time(kind):
    model, schedule, optimizer = start(kind, freeze_batchnorm_at=0.25, freeze_ranges_at=0.5)
    held = ranges(model)[INPUT].item()
    amax, mean = zip(*train(model, schedule, optimizer, 8), strict=True)
    assert len(set(mean[:2])) == 2 and len(set(mean[1:])) == 1
    if kind == "fixed":
        assert set(amax) == {held}
    else:
        # Its values reach the bound of a maximum, so that even PACT moves it.
        assert len(set(amax[:4])) == 4 and len(set(amax[3:])) == 1
    assert schedule.ranges_frozen


def test_the_learning_rates_are_a_cosine():
    _, schedule, optimizer = start("lsq", freeze_ranges_at=0.75, min_factor=0.1)
    for done in range(1, 9):
        schedule.step(optimizer)
        factor = 0.1 + 0.9 * (1 + math.cos(math.pi * done / 8)) / 2
        *others, of_ranges = (group["lr"] for group in optimizer.param_groups)
        assert others == pytest.approx([0.1 * factor] * 2)
        assert of_ranges == pytest.approx(RANGE_LR * factor if done < 6 else 0)
    schedule.step(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_learning_rates_held_in_tensors():
    model = network()
    schedule = qat.QATSchedule(model, 2)
    rate = torch.tensor(0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=True)
    optimizer.param_groups[0]["initial_lr"] = 0.2
    schedule.step(optimizer)
    assert rate.item() == pytest.approx(0.1)


def test_it_calibrates_on_the_batches():
    model = network(calibrated=False)
    qat.QATSchedule(model, 4, batches=[images()], progress=False)
    assert torch.equal(ranges(model)[INPUT], images().abs().max())


def test_neither_batches_nor_ranges():
    told = r"6 quantizer\(s\) have none: 0._input_quantizer, .*Pass batches=\[...\] to calibrate on"
    with pytest.raises(RuntimeError, match=told):
        qat.QATSchedule(network(calibrated=False), 4)
    with pytest.raises(ValueError, match="no quantizer whose range could train"):
        qat.QATSchedule(nn.Linear(2, 2), 4)


@pytest.mark.parametrize("kind", ["moving", "lsq"])
@pytest.mark.parametrize("cut", [1, 3, 5, 7])
def test_a_resumed_training_is_the_same(kind, cut):
    whole, schedule, optimizer = start(kind)
    train(whole, schedule, optimizer, 8)
    first, schedule, optimizer = start(kind)
    train(first, schedule, optimizer, cut)
    states = [each.state_dict() for each in (first, schedule, optimizer)]
    again = network(seed=4)
    again, schedule, optimizer = start(kind, model=again)
    for each, state in zip((again, schedule, optimizer), states, strict=True):
        each.load_state_dict(state)
    train(again, schedule, optimizer, 8 - cut, first=cut)
    for (name, value), wanted in zip(
        again.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(value, wanted), name


def test_going_back_unfreezes_what_it_froze_and_nothing_else():
    model, schedule, optimizer = start()
    state = schedule.state_dict()
    train(model, schedule, optimizer, 8)
    schedule.load_state_dict(state)
    assert type(model[1]) is nn.BatchNorm2d and schedule.done == 0
    assert model[0]._input_quantizer._range_momentum == 0.99
    frozen = qat.freeze_batchnorm(network())
    start(model=frozen)
    assert type(frozen[1]) is not nn.BatchNorm2d


def test_never():
    model, schedule, optimizer = start(freeze_batchnorm_at=None, freeze_ranges_at=None)
    seen = train(model, schedule, optimizer, 8)
    assert len(set(seen)) == 8


def test_without_an_optimizer_learned_ranges_freeze_all_the_same():
    model, schedule, _ = start("lsq", steps=4)
    for _ in range(4):
        schedule.step()
    assert not any(p.requires_grad for p in qat.range_parameters(model).values())


def test_one_group_for_everything_is_an_error_that_counts_nothing():
    model, schedule, _ = start("lsq")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = "0._input_quantizer._amax is in one group with other parameters.*parameter_groups"
    with pytest.raises(ValueError, match=told):
        schedule.step(optimizer)
    assert schedule.done == 0
    model, schedule, _ = start("lsq", freeze_ranges_at=None)
    schedule.step(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("kind", ["lsq", "pact"])
def test_an_optimizer_from_before_the_ranges_is_an_error_that_counts_nothing(kind):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = qat.QATSchedule(model, 4, ranges=kind, freeze_ranges_at=None)
    told = r"6 learned range\(s\) are not in the optimizer, such as 0._input_quantizer._amax"
    with pytest.raises(ValueError, match=told):
        schedule.step(optimizer)
    assert schedule.done == 0
    qat.freeze_ranges(model)
    schedule.step(optimizer)


def test_the_state_of_another_recipe():
    state = start(steps=8)[1].state_dict()
    with pytest.raises(ValueError, match="schedule with steps=8, this one has steps=9"):
        start(steps=9)[1].load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"ranges": "learned"}, "moving, lsq, pact or fixed, got 'learned'"),
        ({"freeze_ranges_at": 1.5}, "freeze_ranges_at must be from 0 to 1, got 1.5"),
        ({"min_factor": -1.0}, "min_factor must be from 0 to 1"),
        ({"min_factor": None}, "min_factor must be from 0 to 1"),
    ],
)
def test_wrong_arguments(options, told):
    with pytest.raises(ValueError, match=told):
        start(**options)


@pytest.mark.parametrize("steps", [2.5, "4", True])
def test_steps_that_are_no_number_of_steps(steps):
    with pytest.raises(TypeError, match="steps must be an int"):
        start(steps=steps)
