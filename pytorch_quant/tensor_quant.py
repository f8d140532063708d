"""Descriptors, functions and autograd Functions under the names that existing programs import.

The functions keep what those names have always meant, which differs from the rest of the package
in three ways: `narrow_range` is True by default, `tensor_quant` returns the inverse
`scale = bound / amax` (steps per real unit), and an amax of 2**-24 or less counts as 0. The
arithmetic is that of `pytorch_quant.fake_quant`; new code calls `fake_quant.fake_quantize` and
`fake_quant.quantize`.
"""

from __future__ import annotations

from torch import Tensor

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.quant_functions import (
    FakeAffineTensorQuantFunction,
    FakeTensorQuantFunction,
    ScaledE4M3Function,
    TensorQuantFunction,
)
from pytorch_quant.weight_presets import (
    QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW,
    QUANT_DESC_8BIT_PER_TENSOR,
    QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR,
)

__all__ = [
    "QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW",
    "QUANT_DESC_8BIT_PER_TENSOR",
    "QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR",
    "FakeAffineTensorQuantFunction",
    "FakeTensorQuantFunction",
    "QuantDescriptor",
    "ScaledE4M3Function",
    "ScaledQuantDescriptor",
    "TensorQuantFunction",
    "fake_affine_tensor_quant",
    "fake_tensor_quant",
    "scaled_e4m3",
    "tensor_quant",
]

ScaledQuantDescriptor = QuantDescriptor


def tensor_quant(
    inputs: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> tuple[Tensor, Tensor]:
    """Integer codes, and the inverse scale `bound / amax`.

    Where amax is 0, or not above 2**-24, the codes are 0 and the scale is 1. The gradient of the
    codes is straight through where `|x| <= amax`.

    Args:
        inputs: Any shape, floating point.
        amax: Real units, one value or broadcastable to `inputs`.
        num_bits: 2 to 16.
        unsigned: Codes from 0 up.
        narrow_range: Leave the lowest signed code unused.

    Returns:
        The codes as floating-point values, in the shape of `inputs` and in its dtype where that
        holds them exactly, else float32; the scale in steps per real unit, in the shape of `amax`
        and the dtype of `inputs`.

    Raises:
        TypeError: `inputs` is not floating point, `num_bits` is no int, or negative values with
            `unsigned` (`Negative values encountered`).
        ValueError: `amax` is negative, not finite or of a shape that does not broadcast,
            `num_bits` is out of range, or `inputs` is float16 and the scale above 65504 (`scale
            is too large for FP16`).
    """
    return TensorQuantFunction.apply(inputs, amax, num_bits, unsigned, narrow_range)


def fake_tensor_quant(
    inputs: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> Tensor:
    """Fake quantization: the real values that the codes of `tensor_quant` stand for.

    0 where amax is 0, or not above 2**-24. Negative values become 0 with `unsigned`. The gradient
    is straight through where `|x| <= amax`. While an ONNX exporter runs, it is a Q/DQ pair.

    Args:
        inputs: Any shape, floating point.
        amax: Real units, one value or broadcastable to `inputs`.
        num_bits: 2 to 16.
        unsigned: Codes from 0 up.
        narrow_range: Leave the lowest signed code unused.

    Returns:
        The shape and dtype of `inputs`.

    Raises:
        TypeError: `inputs` is not floating point, or `num_bits` is no int.
        ValueError: `amax` is negative, not finite or of a shape that does not broadcast,
            `num_bits` is out of range, or in an export the grid has no ONNX form.
    """
    return FakeTensorQuantFunction.apply(inputs, amax, num_bits, unsigned, narrow_range)


def fake_affine_tensor_quant(
    inputs: Tensor, min_range: Tensor | float, max_range: Tensor | float, num_bits: int = 8
) -> Tensor:
    """Fake quantization on an affine grid, per tensor.

    The formula is that of Jacob et al. 2018 (arXiv 1712.05877, section 2.1):

        scale = (max_range - min_range) / (2**num_bits - 1)
        zero_point = -round(min_range / scale)
        y = (clamp(round(x / scale) + zero_point, 0, 2**num_bits - 1) - zero_point) * scale

    The rounding of the zero point shifts the range by half a step at most, so that 0 is exact in
    every range that holds it. A range that does not hold 0 is taken as it is. A range of one
    value gives that value. The gradient is straight through where `min_range <= x <= max_range`.

    Args:
        inputs: Any shape, floating point.
        min_range: The lower end in real units, one value.
        max_range: The upper end in real units, one value, not below the lower end.
        num_bits: 2 to 16.

    Returns:
        The shape and dtype of `inputs`.

    Raises:
        TypeError: `inputs` is not floating point, or `num_bits` is no int.
        ValueError: an end of the range is not finite or has several values, the ends are swapped,
            or `num_bits` is out of range.
    """
    return FakeAffineTensorQuantFunction.apply(inputs, min_range, max_range, num_bits)


def scaled_e4m3(input: Tensor, amax: Tensor | float | None, E: int = 4, M: int = 3) -> Tensor:
    """Fake quantization to E4M3 (OCP FP8): amax maps to 448, the largest finite value.

    The gradient is straight through where `|x| <= amax`. While an ONNX exporter runs, it is a
    Q/DQ pair.

    Args:
        input: Any shape, floating point.
        amax: Real units, one value or broadcastable to `input`; None stands for 448, a scale of 1.
        E: Exponent bits: 4.
        M: Mantissa bits: 3.

    Returns:
        The shape and dtype of `input`.

    Raises:
        TypeError: `input` is not floating point, or another format than E4M3.
        ValueError: `amax` is negative, not finite or of a shape that does not broadcast.
    """
    return ScaledE4M3Function.apply(input, amax, E, M)
