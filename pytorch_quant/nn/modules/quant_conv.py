"""The convolutions under an old module path; see `pytorch_quant.nn.conv`."""

from pytorch_quant.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    _QuantConvMixin,
    _QuantConvTransposeMixin,
)

# What all convolutions derive from, under its old name.
_QuantConvNd, _QuantConvTransposeNd = _QuantConvMixin, _QuantConvTransposeMixin

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "_QuantConvNd",
    "_QuantConvTransposeNd",
]
