"""The networks of the coverage table: how each is built, and what it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 150_000_000


@dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
        name: Stands in the table.
        family: `classification`, `segmentation`, `detection` or `own`.
        build: Makes it, with random weights.
        inputs: Makes a batch for it, of a given number of examples, from a generator.
        size: Parameters; 0 where they are few.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    size: int = 0


def _images(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 3, size, size, generator=generator)


def torchvision_entries() -> tuple[list[Entry], list[tuple[str, str]]]:
    """All networks of torchvision that count, and those left out with the reason."""
    models = torchvision.models
    families = {
        "classification": models,
        "segmentation": models.segmentation,
        "detection": models.detection,
    }
    entries, left = [], []
    for family, module in families.items():
        for name in models.list_models(module=module):
            weights = torchvision.models.get_model_weights(name)
            size = min(w.meta["num_params"] for w in weights)
            if size >= LARGEST:
                left.append((name, f"{size / 1e6:.0f} M parameters"))
                continue
            side = _side(family, name)
            build = partial(_build, family, name)
            entries.append(Entry(name, family, build, partial(_images, side), size))
    return entries, left


def _bare(family: str, name: str, **options: Any) -> nn.Module:
    if family == "classification":
        return torchvision.models.get_model(name, weights=None, **options)
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)


def _side(family: str, name: str) -> int:
    if family == "detection":
        return 320 if name.startswith("ssd") and "lite" in name else 300 if "ssd" in name else 128
    if name == "inception_v3":
        return 299
    # These pool to a grid that smaller images do not fill.
    if name.startswith(("maxvit", "alexnet", "vgg")):
        return 224
    return 64


def _build(family: str, name: str) -> nn.Module:
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options["image_size"] = 64
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    model = _bare(family, name, **options)
    return _RawHeads(model) if family == "detection" else model


class _RawHeads(nn.Module):
    """A detector from the image to what its heads put out, before boxes are decoded.

    In a two-stage detector the second stage sees regions of a fixed grid: which regions the first
    stage proposes is decided by code that no runtime quantizes.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> list[Tensor]:
        detector: Any = self.detector
        features = list(detector.backbone(x).values())
        if hasattr(detector, "rpn"):
            outputs = [t for level in detector.rpn.head(features) for t in level]
            return outputs + self._second_stage(features)
        found = detector.head(features)
        return list(found.values()) if isinstance(found, dict) else list(found)

    def _second_stage(self, features: list[Tensor]) -> list[Tensor]:
        heads: Any = self.detector.roi_heads
        outputs = list(heads.box_predictor(heads.box_head(_regions(features[0], 7))))
        if heads.mask_predictor is not None:
            outputs.append(heads.mask_predictor(heads.mask_head(_regions(features[0], 14))))
        if heads.keypoint_predictor is not None:
            outputs.append(heads.keypoint_predictor(heads.keypoint_head(_regions(features[0], 14))))
        return outputs


def _regions(features: Tensor, size: int) -> Tensor:
    return F.interpolate(features[:, :, : 2 * size, : 2 * size], size=(size, size), mode="nearest")


class _UNet(nn.Module):
    """Concatenations across the U."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def double(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
            )  # fmt: skip

        self.down1, self.down2 = double(3, width), double(width, 2 * width)
        self.bottom = double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join2, self.join1 = double(4 * width, 2 * width), double(2 * width, width)
        self.head = nn.Conv2d(width, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.join2(torch.cat([self.up2(x), second], 1))
        return self.head(self.join1(torch.cat([self.up1(x), first], 1)))


class _YoloHead(nn.Module):
    """CSP blocks, SiLU, a pyramid with upsampling, and a decoupled head on two scales."""

    class _Block(nn.Module):
        def __init__(self, c_in: int, c_out: int) -> None:
            super().__init__()
            self.first = _conv_silu(c_in, c_out, 1)
            self.inner = nn.ModuleList(
                nn.Sequential(
                    _conv_silu(c_out // 2, c_out // 2, 3), _conv_silu(c_out // 2, c_out // 2, 3)
                )
                for _ in range(2)
            )
            self.last = _conv_silu(2 * c_out, c_out, 1)

        def forward(self, x: Tensor) -> Tensor:
            parts = list(self.first(x).chunk(2, 1))
            for inner in self.inner:
                parts.append(parts[-1] + inner(parts[-1]))
            return self.last(torch.cat(parts, 1))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv_silu(3, 32, 3, 2), _conv_silu(32, 64, 3, 2))
        self.fine, self.reduce = self._Block(64, 64), _conv_silu(64, 128, 3, 2)
        self.coarse = self._Block(128, 128)
        self.merge = self._Block(192, 64)
        self.heads = nn.ModuleList(
            nn.Sequential(_conv_silu(c, 64, 3), nn.Conv2d(64, 64, 1)) for c in (64, 128)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(self.stem(x))
        coarse = self.coarse(self.reduce(fine))
        merged = self.merge(torch.cat([F.interpolate(coarse, scale_factor=2.0), fine], 1))
        return [head(x) for head, x in zip(self.heads, (merged, coarse), strict=True)]


def _conv_silu(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.SiLU(inplace=True))


class _Recurrent(nn.Module):
    """A speech model: convolution, LSTM, classifier for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(40, 64, 3, padding=1)
        self.lstm = nn.LSTM(64, 64, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).transpose(1, 2)
        return self.out(self.lstm(x)[0])


class _SharedLayers(nn.Module):
    """One block used for every step, as in weight-tied networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x.mean((2, 3)))


class _TakesDict(nn.Module):
    """Two inputs by name, one output by name."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.features = nn.Embedding(100, 64), nn.Linear(48, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 16)

    def forward(self, tokens: Tensor, features: Tensor) -> dict[str, Tensor]:
        return {"scores": self.head(self.encoder(self.tokens(tokens) + self.features(features)))}


class _Translation(nn.Module):
    """`nn.Transformer` with a causal mask, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 64)
        self.transformer = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
        self.head = nn.Linear(64, 32)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = torch.full((12, 12), float("-inf")).triu(1)
        return self.head(
            self.transformer(
                self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=False
            )
        )


def own_entries() -> list[Entry]:
    """Networks of the shapes that torchvision lacks."""

    def pair(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn(count, n, 32, generator=generator) for n in (10, 12))

    def frames(count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, 40, 50, generator=generator)

    def named(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "tokens": torch.randint(100, (count, 20), generator=generator),
            "features": torch.randn(count, 20, 48, generator=generator),
        }

    return [
        Entry("nn.Transformer", "own", _Translation, pair),
        Entry("LSTM", "own", _Recurrent, frames),
        Entry("U-Net", "own", _UNet, partial(_images, 64)),
        Entry("YOLO-style", "own", _YoloHead, partial(_images, 64)),
        Entry("shared layers", "own", _SharedLayers, partial(_images, 32)),
        Entry("dictionary", "own", _TakesDict, named),
    ]
