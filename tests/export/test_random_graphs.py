"""Random small networks, exported both ways for every target, against torch's fake quantization."""

import numpy as np
import onnx_runs
import pytest
import torch
from torch import nn

from pytorch_quant import calibrate, export_onnx, quantize
from pytorch_quant.export.targets import TARGETS


class Branches(nn.Module):
    def __init__(self, left, right, join):
        super().__init__()
        self.left, self.right, self.join = left, right, join

    def forward(self, x):
        a, b = self.left(x), self.right(x)
        return a + b if self.join == "add" else torch.cat([a, b], 1)


class PixelAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x):
        pixels = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(pixels).chunk(3, -1)
        attention = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out(attention).transpose(1, 2).unflatten(2, x.shape[2:])


def convolution(random, channels, out):
    kinds = [
        lambda: nn.Conv2d(channels, out, 3, padding=1),
        lambda: nn.Conv2d(channels, out, 3, padding=1, groups=2, bias=False),
        lambda: nn.Conv2d(channels, out, 1),
        lambda: nn.ConvTranspose2d(channels, out, 3, padding=1),
        lambda: nn.ConvTranspose2d(channels, out, 3, padding=1, groups=2),
    ]
    return kinds[random.integers(len(kinds))]()


def block(random, channels):
    """A part of a network, and the number of channels that leave it."""
    out = int(random.choice([16, 32]))
    kind = random.choice(["plain", "add", "concat", "attention", "pool"])
    if kind == "plain":
        act = [nn.ReLU(), nn.SiLU(), nn.Hardswish()][random.integers(3)]
        return nn.Sequential(convolution(random, channels, out), act), out
    if kind == "add":
        left = nn.Sequential(convolution(random, channels, channels), nn.ReLU())
        left.append(convolution(random, channels, channels))
        right = [nn.Identity(), nn.Conv2d(channels, channels, 1)][random.integers(2)]
        return nn.Sequential(Branches(left, right, "add"), nn.ReLU()), channels
    if kind == "concat":
        sides = [convolution(random, channels, 16) for _ in range(2)]
        return Branches(*sides, "concat"), 32
    if kind == "attention":
        return PixelAttention(channels), channels
    return nn.Sequential(nn.MaxPool2d(3, 1, 1), convolution(random, channels, out)), out


def network(seed):
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    channels, parts = 16, [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(random.integers(1, 4)):
        part, channels = block(random, channels)
        parts.append(part)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 16)]
    return nn.Sequential(*parts, *head).eval()


def flips(model):
    """What one step of a code in front of the last layer may move the output by, generously."""
    layer = model[-1]
    step = float(layer._input_quantizer.scale) if hasattr(layer, "_input_quantizer") else 0.0
    weights = layer.weight.detach().abs().sum(1).max()
    return 2 * step * float(weights) + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("seed", range(2))
def test_a_random_network_runs_as_it_was_simulated(tmp_path, seed, dynamo, target):
    # Other networks for each exporter and target, to see more of them.
    number = seed + 2 * TARGETS.index(target) + 6 * dynamo
    model = network(number)
    batches = [torch.randn(3, 3, 6, 6) for _ in range(2)]
    placement = "tensorrt" if target == "tensorrt" else "onnxruntime"
    quantize(model, example_inputs=batches[0], placement=placement)
    calibrate(model, batches, progress=False)
    report = export_onnx(
        model,
        batches[0],
        tmp_path / "m.onnx",
        target=target,
        dynamic_shapes=({0: "batch"},),
        dynamo=dynamo,
    )
    assert report.quantized_layers > 0
    for x in (batches[0], torch.randn(5, 3, 6, 6)):
        (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
        expected = model(x).detach()
        np.testing.assert_allclose(got, expected, atol=flips(model))
