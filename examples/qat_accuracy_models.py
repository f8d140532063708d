"""The two small networks of `qat_accuracy.py`, and a harder network that computes the same."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn


def unit(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its batch norm: `(N, c_in, H, W)` to `(N, c_out, H / stride, ...)`."""
    padding = kernel // 2
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Block(nn.Module):
    """Three units with a ReLU between each two, beside a shortcut.

    With `depthwise` it is the block of MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), with
    ReLU for ReLU6, which would tie the size of each channel to 6. Otherwise it is the bottleneck
    of ResNet-50 (He et al. 2016, arXiv 1512.03385).
    """

    def __init__(self, c_in: int, middle: int, c_out: int, stride: int, depthwise: bool) -> None:
        super().__init__()
        self.depthwise = depthwise
        groups = middle if depthwise else 1
        self.first = unit(c_in, middle, 1)
        self.second = unit(middle, middle, 3, stride, groups)
        self.third = unit(middle, c_out, 1)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride == 1 and c_in == c_out:
            self.shortcut = nn.Identity()
        elif not depthwise:
            self.shortcut = unit(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, c_in, H, W)` to `(N, c_out, H / stride, W / stride)`."""
        y = self.third(self.relu(self.second(self.relu(self.first(x)))))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return y if self.depthwise else self.relu(y)


def mobilenet() -> nn.Sequential:
    """A depthwise network for images `(N, 1, 32, 32)` and ten classes."""
    shapes = [(8, 24, 8, 1), (8, 24, 16, 2), (16, 48, 16, 1), (16, 48, 24, 2), (24, 72, 24, 1)]
    blocks = [Block(*shape, depthwise=True) for shape in shapes]
    return nn.Sequential(*_stem(), *blocks, unit(24, 64, 1), nn.ReLU(), *_head(64))


def resnet() -> nn.Sequential:
    """A residual network for images `(N, 1, 32, 32)` and ten classes."""
    shapes = [(8, 8, 16, 1), (16, 8, 16, 1), (16, 8, 32, 2), (32, 8, 32, 1)]
    shapes += [(32, 16, 64, 2), (64, 16, 64, 1)]
    blocks = [Block(*shape, depthwise=False) for shape in shapes]
    return nn.Sequential(*_stem(), *blocks, *_head(64))


NETWORKS = {"MobileNetV2": mobilenet, "ResNet": resnet}


def _stem() -> list[nn.Module]:
    return [unit(1, 8, 3, 2), nn.ReLU()]


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


@torch.no_grad()
def rescaled(model: nn.Module, spread: int = 3) -> nn.Module:
    """A copy of `model` that computes the same with channels of very different sizes.

    `relu(s * x) = s * relu(x)` for `s > 0`: a channel that leaves one convolution `s` times as
    large enters the next through weights `s` times as small. Equalization goes the other way
    (Nagel et al. 2019, arXiv 1906.04721, section 4.1). Factors are powers of two, which rounding
    does not touch: outputs are the same bits.

    Args:
        model: One of `NETWORKS`, its batch norms folded.
        spread: Factors are `2**-spread` to `2**spread`, drawn with a fixed seed.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        convs = [block.first[0], block.second[0], block.third[0]]
        for before, after in itertools.pairwise(convs):
            powers = torch.randint(-spread, spread + 1, before.bias.shape, generator=generator)
            scale = 2.0**powers
            before.weight *= scale[:, None, None, None]
            before.bias *= scale
            # A depthwise weight is (C, 1, R, S): its input channels are its outputs.
            shape = (-1, 1, 1, 1) if after.groups > 1 else (1, -1, 1, 1)
            after.weight /= scale.reshape(shape)
    return model
