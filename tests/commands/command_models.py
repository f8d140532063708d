"""Small models that command lines name, and the data for them."""

import numpy as np
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = Block(16)
        self.fc = nn.Linear(16 * 16, classes)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(self.block(x).flatten(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 32)
        self.left = nn.Linear(32, 32)

    def forward(self, codes, x):
        return self.left(self.words(codes).mean(1) + x)


def build(classes=10):
    torch.manual_seed(3)
    print("a model that prints")
    return Net(classes)


def two_inputs():
    torch.manual_seed(3)
    return TwoInputs()


def fails():
    raise KeyError("inside")


def no_model():
    return [1]


ready_made = nn.Linear(16, 16)


def arrays(path, count=24):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 3, 4, 4)).astype(np.float32)
    np.savez(path, x=x, labels=rng.integers(0, 10, count))
    return x, np.load(path)["labels"]
