"""Number formats as values: the one source of bounds, code ranges and storage types.

A format describes the integer or floating-point grid that a real number is rounded to. With
`scale = amax / bound`, `amax` lands on the largest code of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class IntFormat:
    """A signed or unsigned integer grid.

    Attributes:
        bits: Width in bits, 2 to 16.
        signed: Two's complement if true, else the codes start at 0.
        narrow: Drop the lowest signed code, so that the grid is symmetric.
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    @property
    def bound(self) -> float:
        """The code that `amax` maps to: 127 for int8, 255 for uint8, 7 for int4."""
        return float(2 ** (self.bits - int(self.signed)) - 1)

    @property
    def qmin(self) -> float:
        """The smallest code."""
        if not self.signed:
            return 0.0
        return -self.bound if self.narrow else -self.bound - 1.0

    @property
    def qmax(self) -> float:
        """The largest code."""
        return self.bound

    @property
    def name(self) -> str:
        """A short name that `parse_format` reads back, such as `int8`, `uint4`, `int8_narrow`."""
        return f"{'' if self.signed else 'u'}int{self.bits}{'_narrow' if self.narrow else ''}"

    @property
    def storage_bits(self) -> int:
        """Bits of the smallest ONNX integer type that holds the codes: 8 or 16."""
        return 8 if self.bits <= 8 else 16

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype that holds the codes."""
        types = {
            (8, True): torch.int8,
            (8, False): torch.uint8,
            (16, True): torch.int16,
            (16, False): torch.uint16,
        }
        return types[self.storage_bits, self.signed]

    def round(self, x: Tensor) -> Tensor:
        """Saturate and round `x`, given in steps, to the grid; half goes to even.

        Rounding after saturation gives the same codes as before it, because the limits are
        integers.
        """
        return x.clamp(self.qmin, self.qmax).round()

    def magnitudes(self) -> np.ndarray:
        """The non-negative representable magnitudes in steps, ascending, shape `(bound + 1,)`."""
        return np.arange(self.bound + 1, dtype=np.float64)


@dataclass(frozen=True)
class FloatFormat:
    """A small floating-point grid without infinities: E4M3 (OCP FP8) or E2M1 (FP4).

    The largest finite values are those of the OCP 8-bit specification and of the OCP
    microscaling specification: 448 and 6.

    Attributes:
        exponent: Exponent bits.
        mantissa: Mantissa bits.
    """

    exponent: int
    mantissa: int

    @property
    def bound(self) -> float:
        """The largest finite magnitude, to which `amax` maps."""
        return _LARGEST_FLOAT[self.exponent, self.mantissa]

    @property
    def qmin(self) -> float:
        """The smallest code."""
        return -self.bound

    @property
    def qmax(self) -> float:
        """The largest code."""
        return self.bound

    @property
    def signed(self) -> bool:
        """Floating-point formats always carry a sign."""
        return True

    @property
    def name(self) -> str:
        """A short name that `parse_format` reads back, such as `e4m3`."""
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype that holds one code (E2M1 codes are exact in E4M3)."""
        return torch.float8_e4m3fn

    def round(self, x: Tensor) -> Tensor:
        """Saturate and round `x`, given in units of the scale, to the grid; half goes to even."""
        x = x.clamp(self.qmin, self.qmax)
        # Half of the exponent codes are below 1; the lowest one holds the subnormals.
        least = 2 - 2 ** (self.exponent - 1)
        exponent = torch.frexp(x).exponent - 1
        step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=least) - self.mantissa)
        return (x / step).round() * step

    def magnitudes(self) -> np.ndarray:
        """The non-negative representable magnitudes, ascending."""
        bias = 2 ** (self.exponent - 1) - 1
        fraction = np.arange(2**self.mantissa) / 2**self.mantissa
        subnormal = fraction * 2.0 ** (1 - bias)
        normal = [(1 + fraction) * 2.0 ** (e - bias) for e in range(1, 2**self.exponent)]
        values = np.concatenate([subnormal, *normal])
        return values[values <= self.bound]


_LARGEST_FLOAT = {(4, 3): 448.0, (2, 1): 6.0}

Format = IntFormat | FloatFormat


def make_format(
    num_bits: int | tuple[int, int], unsigned: bool = False, narrow_range: bool = False
) -> Format:
    """Build the format that descriptor fields describe.

    Args:
        num_bits: Integer width 2 to 16, or `(4, 3)` (E4M3) or `(2, 1)` (E2M1).
        unsigned: Integer codes from 0 up.
        narrow_range: Leave the lowest signed code unused.

    Raises:
        TypeError: `num_bits` is neither an int nor a supported pair.
        ValueError: the width is out of range, or the combination does not exist.
    """
    if isinstance(num_bits, (tuple, list)):
        pair = tuple(num_bits)
        if pair not in _LARGEST_FLOAT:
            raise TypeError(
                f"num_bits={pair} is not a supported floating-point format; "
                "use (4, 3) for E4M3 or (2, 1) for E2M1"
            )
        if unsigned or narrow_range:
            raise ValueError(
                f"num_bits={pair} is a signed floating-point format without a narrow range; "
                "drop unsigned and narrow_range"
            )
        return FloatFormat(*pair)
    if isinstance(num_bits, bool) or not isinstance(num_bits, (int, np.integer)):
        raise TypeError(
            f"num_bits must be an int from 2 to 16 or a pair such as (4, 3), got {num_bits!r}"
        )
    if not 2 <= num_bits <= 16:
        raise ValueError(f"num_bits={num_bits} is out of range; use 2 to 16")
    return IntFormat(int(num_bits), not unsigned, narrow_range and not unsigned)


def parse_format(name: str) -> Format:
    """Read back the `name` of a format.

    Raises:
        ValueError: `name` is no format name.
    """
    for exponent, mantissa in _LARGEST_FLOAT:
        if name == FloatFormat(exponent, mantissa).name:
            return FloatFormat(exponent, mantissa)
    body, narrow = name.removesuffix("_narrow"), name.endswith("_narrow")
    signed = not body.startswith("u")
    digits = body.removeprefix("u").removeprefix("int")
    if not digits.isdigit():
        raise ValueError(f"{name!r} is not a number format; examples: int8, uint8, int4, e4m3")
    return IntFormat(int(digits), signed, narrow)
