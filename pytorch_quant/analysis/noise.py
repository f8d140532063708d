"""Error power beside signal power, summed over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pytorch_quant.batches import count
from pytorch_quant.improve.layers import repeatable


class Noise:
    """Sums of squares of a signal and of its error.

    Attributes:
        signal: The sum of `x**2`.
        noise: The sum of `(y - x)**2`.
        values: How many values these are sums of.
    """

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0
        self.values = 0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Count `found` in place of `expected`, a tensor of the same shape.

        Entries that are not finite in `expected`, such as those of a mask, do not count.
        """
        signal, noise, values = squares(expected, found)
        self.signal += signal
        self.noise += noise
        self.values += values

    @property
    def ratio(self) -> float:
        """`noise / signal`; 0 without noise, NaN without values."""
        if self.noise == 0:
            return 0.0 if self.values else math.nan
        return self.noise / self.signal if self.signal else math.inf

    @property
    def db(self) -> float:
        """The SQNR `10 log10(signal / noise)`, dB; infinite without noise, NaN without values."""
        return to_db(self.ratio)


def to_db(ratio: float) -> float:
    """`-10 log10(ratio)` of a ratio noise / signal."""
    if math.isnan(ratio):
        return math.nan
    if ratio == 0:
        return math.inf
    return -math.inf if ratio == math.inf else -10 * math.log10(ratio)


def squares(expected: Tensor, found: Tensor) -> tuple[float, float, int]:
    """The sums of `expected**2` and `(found - expected)**2`, in float64, and of how many values.

    Entries that are not finite in `expected` are left out.
    """
    with torch.no_grad():
        x, error = expected.detach(), found.detach().double() - expected.detach().double()
        real = torch.isfinite(x)
        if not bool(real.all()):
            x, error = x[real], error[real]
        signal = torch.linalg.vector_norm(x.double().reshape(-1)) ** 2
        noise = torch.linalg.vector_norm(error.reshape(-1)) ** 2
    value = float(noise)
    return float(signal), math.inf if math.isnan(value) else value, x.numel()


def add_outputs(noise: Noise, expected: list[Tensor], found: list[Tensor], site: str) -> None:
    """Count all tensors that a model returned.

    Raises:
        RuntimeError: quantized, the model returns other shapes.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, found)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(
            f"with {site or 'the model'} quantized the model returns tensors of shapes "
            f"{shapes[1]}, in float {shapes[0]}, so that they cannot be compared; pass "
            "forward=lambda model, batch: ... that returns tensors of a fixed shape"
        )
    for one, other in zip(expected, found, strict=True):
        noise.add(one, other)


def check_measured(noise: Noise, who: str) -> None:
    """Check that there was something to measure.

    Raises:
        ValueError: the outputs had no finite value.
    """
    if not noise.values:
        raise ValueError(
            f"{who}: in float the model returned no finite value, so that no error can be "
            "measured; the batches hold no samples, or the output is infinite"
        )


def checked_batches(batches: Any, who: str) -> Any:
    """`batches`, once it is sure that it can be run through.

    Raises:
        TypeError: it is one tensor, one mapping, a text, or nothing that can be run through.
    """
    return batches if isinstance(batches, Iterator) else repeatable(batches, who)


def in_turn(batches: Iterable[Any], who: str, progress: bool, runs: int = 1) -> Iterator[Any]:
    """The batches, each with the function that counts one of its `runs` on a progress bar.

    Raises:
        ValueError: there are none.
    """
    total = count(batches)
    seen = 0
    bar = tqdm(total=None if total is None else total * runs, desc=who, disable=not progress)
    with bar:
        for batch in batches:
            seen += 1
            yield batch, bar.update
    if not seen:
        raise ValueError(f"{who}: no batches to run; the loader is empty")
