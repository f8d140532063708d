"""Residual networks: ResNet, ResNeXt and wide variants.

He et al. 2015 (arXiv 1512.03385), Xie et al. 2016 (arXiv 1611.05431), Zagoruyko and Komodakis 2016
(arXiv 1605.07146). Parameter names, shapes and order are torchvision's, so that its checkpoints
load, into a float and into a quantized model alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pytorch_quant import nn as quant_nn
from pytorch_quant.models.blocks import BasicBlock, Bottleneck, NormLayer, conv


class ResNet(nn.Module):
    """A residual network for images.

    Built with `quantize=False` while `quant_modules.initialize()` is active, its layers become
    quantized too, but not its residual connections.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: Number of blocks in each of the four stages.
        num_classes: Number of outputs.
        zero_init_residual: Start the last norm scale of every block at 0, so that each block starts
            as its identity.
        groups: Groups of the 3x3 convolutions.
        width_per_group: Channels of each group for 64 planes.
        replace_stride_with_dilation: For each of the last three stages, whether its convolutions
            are dilated instead of strided.
        norm_layer: Called with a number of channels; `nn.BatchNorm2d` by default.
        quantize: Build quantized convolutions, global average pooling and classifier, and give each
            block a `residual_quantizer` on its identity branch, after the downsample if there is
            one. The convolution side of the add has none.
        small_input: For images of about 32x32: a 3x3 stem of stride 1 and no max pooling.
        width: Channels of the stem; the stages have 1, 2, 4 and 8 times as many planes.
        in_channels: Channels of the images.

    Raises:
        ValueError: a number that no network can be built from.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        quantize: bool = False,
        small_input: bool = False,
        width: int = 64,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "width": width, "in_channels": in_channels}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        dilate = tuple(replace_stride_with_dilation or (False, False, False))
        if len(layers) != 4 or len(dilate) != 3:
            raise ValueError(
                "layers has four entries and replace_stride_with_dilation three, got "
                f"{list(layers)} and {list(dilate)}"
            )
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        # Local, not attributes: a lambda held by the model would keep it from being pickled.
        build = partial(
            block, groups=groups, base_width=width_per_group, norm_layer=norm, quantize=quantize
        )
        self.inplanes = width
        self.dilation = 1

        kernel_size, stride = (3, 1) if small_input else (7, 2)
        self.conv1 = conv(in_channels, width, kernel_size, stride=stride, quantize=quantize)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(build, width, layers[0])
        self.layer2 = self._stage(build, width * 2, layers[1], 2, dilate[0])
        self.layer3 = self._stage(build, width * 4, layers[2], 2, dilate[1])
        self.layer4 = self._stage(build, width * 8, layers[3], 2, dilate[2])
        # Looked up at run time, so that quant_modules.initialize() applies to them as well.
        pooling = quant_nn.QuantAdaptiveAvgPool2d if quantize else nn.AdaptiveAvgPool2d
        linear = quant_nn.QuantLinear if quantize else nn.Linear
        self.avgpool = pooling((1, 1))
        self.fc = linear(self.inplanes, num_classes)
        self._init_weights(zero_init_residual)

    def _stage(
        self,
        build: Callable[..., BasicBlock | Bottleneck],
        planes: int,
        num_blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        # The first block of a dilated stage still sees what was sampled without dilation.
        dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        blocks = []
        for _ in range(num_blocks):
            block = build(self.inplanes, planes, stride, dilation=dilation)
            blocks.append(block)
            self.inplanes = planes * block.expansion
            stride, dilation = 1, self.dilation
        return nn.Sequential(*blocks)

    def _init_weights(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            # The base class, because a patch may stand where `nn.Conv2d` was.
            if isinstance(module, _ConvNd):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _BatchNorm | nn.GroupNorm) and module.affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if not zero_init_residual:
            return
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if isinstance(last.weight, Tensor):
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: `(N, in_channels, H, W)`.

        Returns:
            Logits, `(N, num_classes)`.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(*, quantize: bool = False, **options: Any) -> ResNet:
    """ResNet-18; `options` are the arguments of `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), quantize=quantize, **options)


def resnet34(*, quantize: bool = False, **options: Any) -> ResNet:
    """ResNet-34; `options` are the arguments of `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), quantize=quantize, **options)


def resnet50(*, quantize: bool = False, **options: Any) -> ResNet:
    """ResNet-50; `options` are the arguments of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), quantize=quantize, **options)


def resnet101(*, quantize: bool = False, **options: Any) -> ResNet:
    """ResNet-101; `options` are the arguments of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), quantize=quantize, **options)


def resnet152(*, quantize: bool = False, **options: Any) -> ResNet:
    """ResNet-152; `options` are the arguments of `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), quantize=quantize, **options)


def resnext50_32x4d(*, quantize: bool = False, **options: Any) -> ResNet:
    """ResNeXt-50 with 32 groups of 4 channels; `options` are the arguments of `ResNet`."""
    return resnet50(quantize=quantize, **{"groups": 32, "width_per_group": 4, **options})


def resnext101_32x8d(*, quantize: bool = False, **options: Any) -> ResNet:
    """ResNeXt-101 with 32 groups of 8 channels; `options` are the arguments of `ResNet`."""
    return resnet101(quantize=quantize, **{"groups": 32, "width_per_group": 8, **options})


def wide_resnet50_2(*, quantize: bool = False, **options: Any) -> ResNet:
    """ResNet-50 with 3x3 convolutions twice as wide; `options` are the arguments of `ResNet`."""
    return resnet50(quantize=quantize, **{"width_per_group": 128, **options})


def wide_resnet101_2(*, quantize: bool = False, **options: Any) -> ResNet:
    """ResNet-101 with 3x3 convolutions twice as wide; `options` are the arguments of `ResNet`."""
    return resnet101(quantize=quantize, **{"width_per_group": 128, **options})


ARCHITECTURES: dict[str, Callable[..., ResNet]] = {
    builder.__name__: builder
    for builder in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnext50_32x4d,
        resnext101_32x8d,
        wide_resnet50_2,
        wide_resnet101_2,
    )
}
"""The builders by name."""


def create_model(arch: str, *, quantize: bool = False, **options: Any) -> ResNet:
    """Build a network by its name.

    Args:
        arch: A key of `ARCHITECTURES`.
        quantize: Build it quantized.
        **options: The arguments of `ResNet`.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """
    if arch not in ARCHITECTURES:
        near = difflib.get_close_matches(arch, ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown architecture {arch!r}; {hint}Valid: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch](quantize=quantize, **options)
