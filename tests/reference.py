"""Independent references, written in NumPy from the formulas of the ONNX specification."""

from __future__ import annotations

import numpy as np


def bound_of(bits: int, unsigned: bool = False) -> int:
    return 2 ** (bits - 1 + unsigned) - 1


def codes(
    x: np.ndarray, amax, bits: int = 8, unsigned: bool = False, narrow: bool = False
) -> np.ndarray:
    """q = saturate(round_half_even(x / scale)); 0 where amax is 0."""
    bound = bound_of(bits, unsigned)
    scale = np.asarray(amax, np.float32) / np.float32(bound)
    low = 0 if unsigned else -bound if narrow else -bound - 1
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.asarray(x, np.float32) / scale
    q = np.clip(np.rint(steps), low, bound)
    return np.where(scale == 0, np.float32(0), q)


def fake_quant(x: np.ndarray, amax, bits: int = 8, unsigned: bool = False, narrow: bool = False):
    """y = q * scale."""
    scale = np.asarray(amax, np.float32) / np.float32(bound_of(bits, unsigned))
    return codes(x, amax, bits, unsigned, narrow).astype(np.float32) * scale


def amax_of(x: np.ndarray, axis=None) -> np.ndarray:
    if axis is None:
        return np.abs(x).max() if x.size else np.float32(0)
    kept = (axis,) if isinstance(axis, int) else axis
    kept = [a % x.ndim for a in kept]
    return np.abs(x).max(tuple(a for a in range(x.ndim) if a not in kept), keepdims=True)
