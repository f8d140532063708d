"""Image classifiers with quantizers where an int8 runtime wants them."""

from pytorch_quant.models.blocks import BasicBlock, Bottleneck, ResidualBlock
from pytorch_quant.models.resnet import (
    ARCHITECTURES,
    ResNet,
    create_model,
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

__all__ = [
    "ARCHITECTURES",
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "ResidualBlock",
    "create_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
