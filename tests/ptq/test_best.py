from collections import UserDict, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import reference
import torch
from torch import nn

from pytorch_quant import QuantDescriptor, TensorQuantizer, calibrate, compute_amax, quant_modules
from pytorch_quant.calib import HistogramCalibrator
from pytorch_quant.ptq.best import CANDIDATES


def network():
    torch.manual_seed(1)
    with quant_modules.initialize():
        return nn.Sequential(nn.Linear(16, 12), nn.ReLU(inplace=True), nn.Linear(12, 5))


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(64, 16, generator=generator) for _ in range(count)]
    made[0][0, 0] = 60.0
    return made


def test_the_method_with_the_least_output_error_wins():
    model, given = network(), batches()
    report = calibrate(model, given, "best", progress=False)
    chosen = {row.name: row.method for row in report.ranges}
    amax = {}
    for method in CANDIDATES:
        compute_amax(model, method)
        amax[method] = float(model[0]._input_quantizer.amax)
    assert len(set(amax.values())) > 3
    x, weight = given[0].numpy().astype(np.float64), model[0].weight.detach().numpy()
    errors = {
        method: (((reference.fake_quant(x, a) - x) @ weight.T.astype(np.float64)) ** 2).sum()
        for method, a in amax.items()
    }
    best = min(errors, key=errors.get)
    assert chosen["0._input_quantizer"] == f"best: {best}"
    compute_amax(model, "best")
    assert float(model[0]._input_quantizer.amax) == amax[best]


def test_more_batches_in_the_sample():
    model, given = network(), batches()
    seen = []

    def forward(model, batch):
        seen.append(batch)
        return model(batch)

    calibrate(model, given, "best", sample_batches=2, forward=forward, progress=False)
    assert len(seen) == 5
    assert all(torch.equal(b, g) for b, g in zip(seen, (*given, *given[:2]), strict=True))


def test_nothing_is_left_behind():
    model = network()
    calibrate(model, batches(), progress=False)
    weights = {k: v.clone() for k, v in model.state_dict().items() if "quantizer" not in k}
    calibrate(model.train(), batches(), "best", progress=False)
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        if isinstance(module, TensorQuantizer):
            assert module._if_quant
            assert not module._if_calib
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())


def test_best_without_a_search():
    model = network()
    calibrate(model, batches(), "mse", progress=False)
    with pytest.raises(ValueError, match="no best method was searched"):
        compute_amax(model, "best")


@dataclass
class Output:
    values: torch.Tensor
    extra: dict


class Block(nn.Module):
    """A quantizer of its own, outputs in a dataclass, a layer in a branch that batches may skip."""

    def __init__(self):
        super().__init__()
        with quant_modules.initialize():
            self.inner = nn.ModuleList([nn.Linear(16, 16)])
            self.skipped = nn.Linear(16, 16)
        self.quantizer = TensorQuantizer()

    def forward(self, x):
        y = self.inner[0](x)
        if x.shape[0] == 2:
            y = self.skipped(y)
        x.mul_(2)
        return Output(y + self.quantizer(x), {"sum": [y.sum(1)]})


def test_any_module_can_be_the_layer():
    model = Block()
    given = [*batches(2), torch.randn(2, 16)]
    report = calibrate(model, given, "best", progress=False)
    methods = {row.name: row.method for row in report.ranges}
    # Not in the sample, and so without a comparison.
    assert methods["skipped._input_quantizer"] == "best: mse"
    assert methods["quantizer"].startswith("best: ")
    assert methods["inner.0._weight_quantizer"] == "max"
    assert isinstance(model.quantizer._calibrator, HistogramCalibrator)


def test_learned_ranges_start_from_the_best():
    model = network()
    with quant_modules.initialize():
        model[0] = nn.Linear(16, 12)
    model[0]._input_quantizer = TensorQuantizer(QuantDescriptor(learn_amax=True))
    calibrate(model, batches(), "best", progress=False)
    quantizer = model[0]._input_quantizer
    assert float(quantizer.clip.clip_value_max.detach()) == float(
        quantizer._calibrator.compute_amax("best")
    )


class Writing(nn.Module):
    """Writes to the batch it is given, which comes in a container of its own kind."""

    def __init__(self):
        super().__init__()
        self.layer = network()

    def forward(self, held):
        x = held["x"]
        y = self.layer(x)
        return {"y": y, "x": x.fill_(1e3)}


@pytest.mark.parametrize(
    "make", [dict, lambda **items: defaultdict(list, **items), lambda **items: Keyed(items)]
)
def test_a_model_that_writes_to_its_inputs(make):
    wanted = network()
    calibrate(wanted, batches(), "best", progress=False)
    model = Writing()
    given = [make(x=x) for x in batches()]

    def forward(model, batch):
        assert isinstance(batch, type(given[0]))
        return model(batch)

    calibrate(model, given, "best", forward=forward, progress=False)
    for i in (0, 2):
        chosen = model.layer[i]._input_quantizer._calibrator.best
        assert chosen == wanted[i]._input_quantizer._calibrator.best


class Keyed(UserDict):
    """A mapping that is no dict."""


@pytest.mark.parametrize("first", [0, 1])
def test_a_shared_quantizer_is_judged_by_all_its_layers(first):
    """One layer alone is blind to the quantizer: its weights are almost 0."""
    with quant_modules.initialize():
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[1 - first].weight.mul_(1e-9)
        model[0].bias.zero_()
    shared = model[0]._input_quantizer
    model[1]._input_quantizer = shared
    x = torch.zeros(64, 16)
    x[0, 0] = 60.0
    x[1:] = torch.randn(63, 16)

    def forward(model, batch):
        return [layer(batch) for layer in model]

    calibrate(model, [x], "best", forward=forward, progress=False)
    amax = {}
    for method in CANDIDATES:
        compute_amax(model, method)
        amax[method] = float(shared.amax)
    errors = {}
    for method, a in amax.items():
        difference = reference.fake_quant(x.numpy(), a).astype(np.float64) - x.numpy()
        errors[method] = sum(
            ((difference @ layer.weight.detach().numpy().T.astype(np.float64)) ** 2).sum()
            for layer in model
        )
    assert shared._calibrator.best == min(errors, key=errors.get)


def test_batches_that_are_added_make_the_choice_stale():
    model = network()
    calibrate(model, batches(), "best", progress=False)
    calibrate(model, batches(), "mse", accumulate=True, progress=False)
    with pytest.raises(ValueError, match="no best method was searched"):
        compute_amax(model, "best")
    calibrate(model, batches(), "best", accumulate=True, progress=False)
    compute_amax(model, "best")
