"""Small models that the tests of training share."""

import torch
from torch import nn

from pytorch_quant import calibrate
from pytorch_quant import nn as quant_nn
from pytorch_quant.nn.modes import named_quantizers


def network(calibrated=True, seed=0):
    """Two convolutions and a linear layer; weights per channel, activations per tensor."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        quant_nn.QuantConv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        quant_nn.QuantConv2d(4, 4, 3),
        nn.Flatten(),
        quant_nn.QuantLinear(16, 3),
    )
    if calibrated:
        calibrate(model, [images()], progress=False)
    return model


def images(count=8, seed=1):
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def labels(count=8, seed=1):
    return torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))


def ranges(model):
    return {name: q.amax.clone() for name, q in named_quantizers(model).items()}


def train(model, optimizer, steps=3, forward=None):
    losses = []
    for i in range(steps):
        loss = nn.functional.cross_entropy((forward or model)(images(seed=i)), labels(seed=i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses
