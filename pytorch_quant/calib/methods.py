"""The calibration methods by name, and one search for the amax of many histograms.

| method | amax | from | source |
|---|---|---|---|
| `max` | the largest magnitude | maxima | |
| `mean_max` | the mean of the largest magnitudes of the batches | maxima | Krishnamoorthi 2018 |
| `moving_max` | their exponential moving average | maxima | Jacob et al. 2018, section 3.1 |
| `percentile` | exceeded by a given share of the values | histogram | McKinstry et al. 2018 |
| `mse` | least mean squared error of the values | histogram | Sung et al. 2015 |
| `entropy` | least KL divergence of the distributions | histogram | Migacz 2017 |
| `lp` | least mean `|error|**p` | histogram | Nahshan et al. 2021 |
| `best` | that of these with the least output error of the layer | histogram, sample | |

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018. Krishnamoorthi, "Quantizing deep convolutional networks for efficient
inference: A whitepaper", arXiv 1806.08342. McKinstry et al., "Discovering Low-Precision Networks
Close to Full-Precision Networks for Efficient Embedded Inference", arXiv 1809.04191. Migacz, "8-bit
inference with TensorRT", GTC 2017. Nahshan et al., "Loss Aware Post-training Quantization", Machine
Learning 2021. Sung et al., "Resiliency of Deep Neural Networks under Quantization", arXiv
1511.06488.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pytorch_quant.calib.histogram import Histogram
from pytorch_quant.calib.search import entropy_amax, lp_amax, mse_amax, percentile_amax
from pytorch_quant.formats import Format

MAXIMA_METHODS = ("max", "mean_max", "moving_max")
SEARCH_METHODS = ("percentile", "mse", "entropy", "lp")
METHODS = (*MAXIMA_METHODS, *SEARCH_METHODS, "best")
# What can be answered from a weight alone.
WEIGHT_METHODS = ("max", *SEARCH_METHODS)

# Histograms in one search: 16 MiB of counts at 2048 bins.
_ROWS = 1024


def search_amax(
    histograms: Sequence[Histogram],
    formats: Sequence[Format],
    method: str,
    *,
    percentile: float = 99.99,
    start_bin: int = 128,
    stride: int = 1,
    p: float = 2.4,
) -> list[Tensor]:
    """The amax of each row of many histograms; those of one format are searched together.

    Args:
        histograms: Any numbers of bins and channels, any devices.
        formats: The number format for each.
        method: One of `SEARCH_METHODS`.
        percentile: In percent, of `percentile`. Options of other methods have no effect.
        start_bin: The least candidate, of the other three.
        stride: Bins between candidates, of the other three.
        p: The power of the error, of `lp`.

    Returns:
        For each histogram float32 `(channels,)`, real units, on its device.

    Raises:
        ValueError: an option is out of range.
    """
    amax: list[Tensor] = [torch.empty(0)] * len(histograms)
    groups: dict[tuple[int, Format | None, torch.device], list[int]] = {}
    for i, (histogram, fmt) in enumerate(zip(histograms, formats, strict=True)):
        # A percentile does not depend on the format.
        key = (histogram.bins, None if method == "percentile" else fmt, histogram.counts.device)
        groups.setdefault(key, []).append(i)
    for (_, shared, device), members in groups.items():
        # One copy from the device, not one for each histogram.
        counts = torch.cat([histograms[i].counts for i in members]).cpu()
        exponent = torch.cat([histograms[i].exponent for i in members]).cpu()
        maximum = torch.cat([histograms[i].maximum for i in members]).cpu()
        width = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
        width /= counts.shape[1]
        found = []
        for rows in zip(counts.split(_ROWS), width.split(_ROWS), maximum.split(_ROWS), strict=True):
            if shared is None:
                found.append(percentile_amax(*rows[:2], percentile, maximum=rows[2]))
            elif method == "lp":
                found.append(
                    lp_amax(
                        *rows[:2], shared, p, start_bin=start_bin, stride=stride, maximum=rows[2]
                    )
                )
            else:
                search: Callable[..., Tensor] = mse_amax if method == "mse" else entropy_amax
                found.append(
                    search(*rows[:2], shared, start_bin=start_bin, stride=stride, maximum=rows[2])
                )
        sizes = [histograms[i].channels for i in members]
        parts = torch.cat(found).to(device).split(sizes)
        for i, part in zip(members, parts, strict=True):
            amax[i] = part.clone()
    return amax
