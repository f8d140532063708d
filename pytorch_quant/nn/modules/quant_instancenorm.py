"""The instance norms under an old module path; see `pytorch_quant.nn.norm`."""

from pytorch_quant.nn.norm import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    QuantInstanceNorm1d,
    QuantInstanceNorm2d,
    QuantInstanceNorm3d,
)

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "QuantInstanceNorm1d",
    "QuantInstanceNorm2d",
    "QuantInstanceNorm3d",
]
