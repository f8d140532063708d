"""`pytorch_quantization.calib.histogram`: the searches for amax by their old names."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytorch_quant.calib import HistogramCalibrator, entropy_amax, mse_amax, percentile_amax
from pytorch_quant.calib.weights import calibrate_weights
from pytorch_quant.formats import make_format

__all__ = ["HistogramCalibrator", "calibrate_weights"]

Array = np.ndarray | Tensor


def _compute_amax_entropy(
    calib_hist: Array | None,
    calib_bin_edges: Array | None,
    num_bits: int | tuple[int, int],
    unsigned: bool,
    stride: int = 1,
    start_bin: int = 128,
) -> Tensor | None:
    """The amax with the least divergence; see `calib.search.entropy_amax`.

    Args:
        calib_hist: Counts of magnitudes in equal bins from 0, `(B,)` or `(H, B)`; not changed.
        calib_bin_edges: The borders of the bins in real units, one more than bins.
        num_bits: Integer width, or a floating-point pair.
        unsigned: Codes from 0 up.
        stride: Bins between candidates.
        start_bin: The least candidate, in bins.

    Returns:
        float32, `()` or `(H,)`; None without a histogram.

    Raises:
        TypeError: `num_bits` is of the wrong kind.
        ValueError: no such number format, an option out of range, or edges that do not fit.
    """
    fmt = make_format(num_bits, unsigned)
    search = partial(entropy_amax, fmt=fmt, start_bin=start_bin, stride=stride)
    return _search(search, calib_hist, calib_bin_edges)


def _compute_amax_mse(
    calib_hist: Array | None,
    calib_bin_edges: Array | None,
    num_bits: int | tuple[int, int],
    unsigned: bool,
    stride: int = 1,
    start_bin: int = 128,
) -> Tensor | None:
    """The amax with the least squared error; see `calib.search.mse_amax`.

    Args:
        calib_hist: Counts of magnitudes in equal bins from 0, `(B,)` or `(H, B)`; not changed.
        calib_bin_edges: The borders of the bins in real units, one more than bins.
        num_bits: Integer width, or a floating-point pair.
        unsigned: Codes from 0 up.
        stride: Bins between candidates.
        start_bin: The least candidate, in bins.

    Returns:
        float32, `()` or `(H,)`; None without a histogram.

    Raises:
        TypeError: `num_bits` is of the wrong kind.
        ValueError: no such number format, an option out of range, or edges that do not fit.
    """
    fmt = make_format(num_bits, unsigned)
    search = partial(mse_amax, fmt=fmt, start_bin=start_bin, stride=stride)
    return _search(search, calib_hist, calib_bin_edges)


def _compute_amax_percentile(
    calib_hist: Array | None, calib_bin_edges: Array | None, percentile: float
) -> Tensor | None:
    """The magnitude that `percentile` percent do not exceed; see `calib.search.percentile_amax`.

    Args:
        calib_hist: Counts of magnitudes in equal bins from 0, `(B,)` or `(H, B)`; not changed.
        calib_bin_edges: The borders of the bins in real units, one more than bins.
        percentile: In percent, 0 to 100.

    Returns:
        float32, `()` or `(H,)`; None without a histogram.

    Raises:
        ValueError: `percentile` is out of range, or the edges do not fit.
    """
    search = partial(percentile_amax, percentile=percentile)
    return _search(search, calib_hist, calib_bin_edges)


def _search(search: Any, hist: Array | None, edges: Array | None) -> Tensor | None:
    if hist is None or edges is None:
        return None
    counts, borders = torch.as_tensor(hist), torch.as_tensor(edges).double()
    if borders.shape[-1] != counts.shape[-1] + 1:
        raise ValueError(
            f"{counts.shape[-1]} bins have {counts.shape[-1] + 1} edges, got {borders.shape[-1]}"
        )
    width = (borders[..., 1] - borders[..., 0]).reshape(-1)
    rows = counts.reshape(-1, counts.shape[-1])
    return search(rows, width.expand(len(rows))).reshape(counts.shape[:-1])
