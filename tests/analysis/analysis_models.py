"""Networks for the tests of analysis, trained on digits once."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

from pytorch_quant import calibrate, quantize
from pytorch_quant.demo.digits import Split, load_digits
from pytorch_quant.demo.training import train


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + x)


class Digits(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.block = Residual(width)
        self.squeeze = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.expand = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = self.block(F.relu(self.stem(x)))
        x = F.relu(self.expand(F.relu(self.squeeze(x))))
        return self.head(x.mean((2, 3)))


@functools.cache
def _trained():
    training, testing = (
        Split(F.avg_pool2d(split.images, 2), split.labels) for split in load_digits()
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Digits()
        train(model, training, epochs=3, learning_rate=1e-2, description="digits")
    return model.eval(), training, testing


def trained():
    """A float model of one's own, and the training and the test split."""
    model, training, testing = _trained()
    return copy.deepcopy(model), training, testing


def calibrated(model, batches, rules=None, placement="tensorrt"):
    model = quantize(copy.deepcopy(model), rules, example_inputs=batches[0][0], placement=placement)
    calibrate(model, batches, progress=False)
    return model


def accuracy(model, split):
    with torch.no_grad():
        right = model(split.images).argmax(1) == split.labels
    return 100 * float(right.float().mean())


def make_hard(model, factor=3000.0):
    """Blow up one channel between `squeeze` and `expand`; the float function stays the same.

    Per tensor, the range of the input of `expand` is then that of one channel.
    """
    with torch.no_grad():
        model.squeeze.weight[0] *= factor
        model.squeeze.bias[0] = model.squeeze.bias[0] * factor
        model.expand.weight[:, 0] /= factor
    return model


def state_of(model):
    """Everything that an analysis has to leave alone."""
    modules = {
        name: (
            id(module),
            type(module),
            module.training,
            tuple(module._modules),
            tuple(map(id, module._modules.values())),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            tuple(
                getattr(module, m, None)
                for m in ("_disabled", "_if_quant", "_if_clip", "_if_calib")
            ),
        )
        for name, module in model.named_modules()
    }
    values = {key: value.clone() for key, value in model.state_dict().items()}
    grads = {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return modules, values, grads, flags, torch.random.get_rng_state()


def assert_same_state(before, after):
    assert before[0] == after[0] and before[3] == after[3]
    assert torch.equal(before[4], after[4])
    for one, other in zip(before[1:3], after[1:3], strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = other[key] is None if value is None else torch.equal(value, other[key])
            assert same, key
