"""The classical search for amax, one quantizer and one candidate at a time, as the yardstick.

Written from the descriptions, and on purpose not vectorised over candidates: entropy after S.
Migacz, "8-bit inference with TensorRT", GTC 2017; mean squared error after Sung et al., arXiv
1511.06488; percentile after McKinstry et al., arXiv 1809.04191. It knows signed int8 only, and it
shares no code with `pytorch_quant.calib.search`, so that the agreement of the two says something.

All functions take `counts`, `(B,)` float64, of magnitudes in equal bins from 0 on, and `width`, the
width of a bin in real units. They return amax in real units: the upper edge of a bin, from the bin
`START_BIN` on where there are candidates to choose from.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import entropy

BOUND = 127
LEVELS = BOUND + 1
START_BIN = 128


def entropy_amax(counts: np.ndarray, width: float) -> float:
    """The edge whose quantized distribution diverges least from the real one."""
    counts = counts.copy()
    # Zeros are exact under every amax.
    counts[0] = counts[1]
    candidates = range(START_BIN, len(counts) + 1)
    divergences = []
    for i in candidates:
        reference = counts[:i].copy()
        reference[-1] += counts[i:].sum()
        segment = np.digitize(np.arange(i), np.linspace(0, i, LEVELS + 1)) - 1
        quantized = _spread(counts[:i], segment)
        divergences.append(entropy(reference, quantized) if quantized.any() else np.inf)
    return candidates[int(np.argmin(divergences))] * width


def mse_amax(counts: np.ndarray, width: float) -> float:
    """The edge with the least mean squared error of the fake-quantized values.

    The values of a bin sit at its centre. The candidates are edges, not centres as in some
    programs: between the two the best scale can alias with the bins otherwise, which moves amax by
    percents for a thousandth of the error, and says nothing about a search.
    """
    centres = (np.arange(len(counts)) + 0.5) * width
    candidates = np.arange(START_BIN, len(counts) + 1) * width
    errors = []
    for amax in candidates:
        scale = amax / BOUND
        quantized = np.clip(np.round(centres / scale), -BOUND - 1, BOUND) * scale
        errors.append(np.sum((quantized - centres) ** 2 * counts))
    return float(candidates[int(np.argmin(errors))])


def percentile_amax(counts: np.ndarray, width: float, percentile: float = 99.99) -> float:
    """The upper edge of the bin in which `percentile` percent of the values are reached."""
    reached = np.cumsum(counts) / counts.sum()
    index = np.searchsorted(reached, percentile / 100)
    return (min(int(index), len(counts) - 1) + 1) * width


SEARCHES = {"entropy": entropy_amax, "mse": mse_amax, "percentile": percentile_amax}
"""The searches by the name of the method."""


def _spread(counts: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Each segment's mass, evenly on those of its bins that have counts."""
    mass: dict[int, float] = {}
    filled: dict[int, int] = {}
    # Python's own numbers: iterating over an array is slower, and the yardstick is not to be slow
    # for a reason that is not in the description.
    pairs = list(zip(segment.tolist(), counts.tolist(), strict=True))
    for level, count in pairs:
        if count:
            mass[level] = mass.get(level, 0.0) + count
            filled[level] = filled.get(level, 0) + 1
    return np.array([mass[level] / filled[level] if count else 0.0 for level, count in pairs])
