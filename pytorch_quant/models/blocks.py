"""The residual blocks, and where their quantizers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from pytorch_quant import nn as quant_nn

NormLayer = Callable[[int], nn.Module]


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    quantize: bool,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> nn.Conv2d:
    """A convolution without bias that keeps the spatial size, but for its stride.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: An odd number.
        quantize: Quantize its input and weight.
        stride: Step of the window.
        groups: Groups of channels.
        dilation: Distance of the taps.
    """
    # `nn.Conv2d` is looked up here, not at import, so that quant_modules.initialize() applies.
    layer = quant_nn.QuantConv2d if quantize else nn.Conv2d
    return layer(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        groups=groups,
        bias=False,
    )


class ResidualBlock(nn.Module):
    """What both blocks share: `relu(residual(x) + identity(x))`.

    Attributes:
        downsample: Projects the identity to the shape of the output; None where it has it.
        residual_quantizer: Quantizes the identity, after the downsample; None in a float block.
    """

    expansion: ClassVar[int]
    relu: nn.Module
    downsample: nn.Module | None
    residual_quantizer: quant_nn.TensorQuantizer | None

    def add_identity(
        self, inplanes: int, outplanes: int, stride: int, norm_layer: NormLayer, quantize: bool
    ) -> None:
        """Make the identity branch; called last, which gives the parameters torchvision's order.

        Args:
            inplanes: Channels of the input.
            outplanes: Channels of the output; a projection makes up for a difference.
            stride: Stride of the block; the projection has it too.
            norm_layer: Called with a number of channels.
            quantize: Quantize the projection and the identity.
        """
        self.downsample = None
        if stride != 1 or inplanes != outplanes:
            projection = conv(inplanes, outplanes, 1, stride=stride, quantize=quantize)
            self.downsample = nn.Sequential(projection, norm_layer(outplanes))
        self.residual_quantizer = None
        if quantize:
            # A runtime fuses the last convolution with the add, which then takes its integer
            # sums as they are; only the identity is read from memory, and has to be in int8.
            desc = quant_nn.QuantConv2d.default_quant_desc_input
            self.residual_quantizer = quant_nn.TensorQuantizer(desc)

    def residual(self, x: Tensor) -> Tensor:
        """The convolution side of the add."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Add the two branches.

        Args:
            x: `(N, C, H, W)`.

        Returns:
            `(N, K, H', W')`, the size of the input divided by the stride, rounded up.
        """
        identity = x if self.downsample is None else self.downsample(x)
        if self.residual_quantizer is not None:
            identity = self.residual_quantizer(identity)
        return self.relu(self.residual(x) + identity)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, of ResNet-18 and ResNet-34.

    Args:
        inplanes: Input channels.
        planes: Output channels.
        stride: Stride of the first convolution.
        groups: Must be 1.
        base_width: Must be 64.
        dilation: Must be 1.
        norm_layer: Called with a number of channels.
        quantize: Quantize the convolutions and the identity.

    Raises:
        ValueError: `groups`, `base_width` or `dilation` have another value.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        quantize: bool = False,
    ) -> None:
        super().__init__()
        for name, value, only in (
            ("groups", groups, 1),
            ("width_per_group", base_width, 64),
            ("dilation", dilation, 1),
        ):
            if value != only:
                raise ValueError(
                    f"the blocks of ResNet-18 and ResNet-34 have {name}={only} only, got {value}; "
                    "use a network of bottlenecks, such as resnet50"
                )
        self.conv1 = conv(inplanes, planes, 3, stride=stride, quantize=quantize)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(planes, planes, 3, quantize=quantize)
        self.bn2 = norm_layer(planes)
        self.add_identity(inplanes, planes, stride, norm_layer, quantize)

    def residual(self, x: Tensor) -> Tensor:
        """The convolution side of the add."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, of ResNet-50 and deeper.

    The stride is that of the 3x3 convolution, as in torchvision ("V1.5"); the paper has it in the
    first 1x1, which drops three quarters of its input unseen.

    Args:
        inplanes: Input channels.
        planes: A quarter of the output channels.
        stride: Stride of the 3x3 convolution.
        groups: Groups of the 3x3 convolution.
        base_width: Channels of each group for 64 planes.
        dilation: Dilation of the 3x3 convolution.
        norm_layer: Called with a number of channels.
        quantize: Quantize the convolutions and the identity.

    Raises:
        ValueError: the groups would have no channel.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        quantize: bool = False,
    ) -> None:
        super().__init__()
        per_group = planes * base_width // 64
        if per_group < 1:
            raise ValueError(
                f"width={planes} with width_per_group={base_width} leaves groups without a "
                "channel; width * width_per_group must be at least 64"
            )
        inner = per_group * groups
        self.conv1 = conv(inplanes, inner, 1, quantize=quantize)
        self.bn1 = norm_layer(inner)
        self.conv2 = conv(
            inner, inner, 3, stride=stride, groups=groups, dilation=dilation, quantize=quantize
        )
        self.bn2 = norm_layer(inner)
        outplanes = planes * self.expansion
        self.conv3 = conv(inner, outplanes, 1, quantize=quantize)
        self.bn3 = norm_layer(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.add_identity(inplanes, outplanes, stride, norm_layer, quantize)

    def residual(self, x: Tensor) -> Tensor:
        """The convolution side of the add."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))
