"""A quantized model on digits whose weights need no training, and its report."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from pytorch_quant import INT8, calibrate, quantize
from pytorch_quant.demo.digits import load_digits

# Too small to gain by int8, so that no plan quantizes it unasked.
RULES = {"head": INT8}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + x)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.block = Block()
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.block(F.relu(self.stem(x))).mean((2, 3)))


def data(count=2):
    training, _ = load_digits()
    return [(F.avg_pool2d(training[i][0][:16], 2), training[i][1][:16]) for i in range(count)]


def tiny_models(method="max"):
    """The float model, the quantized one, and batches."""
    torch.manual_seed(0)
    batches = data()
    plain = Tiny().eval()
    model = quantize(copy.deepcopy(plain), RULES, example_inputs=batches[0][0])
    calibrate(model, batches, method, progress=False)
    return plain, model, batches
