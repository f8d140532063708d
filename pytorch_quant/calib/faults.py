"""Bad batches on an accelerator: noted there, left out, and reported when statistics are read.

Reading back whether a batch is good would stop the device for every tensor. A calibrator notes
its first bad batch in a tensor on the device instead, its *fault*: whether the values were finite,
the least of them, and the number of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pytorch_quant.calib.histogram import CalibrationError, bad_values


class Pass:
    """Batches that many calibrators collect together.

    From the first bad tensor on, all of them leave out what they meet, on the device where it
    was met. Those that had met tensors of the same batch before it keep them: taking them back
    would cost a copy of all statistics for every batch, or a wait for the device.

    Attributes:
        batch: The number of the current batch.
    """

    def __init__(self) -> None:
        self.batch = 0
        self._good: dict[torch.device, Tensor] = {}

    def valid(self, good: Tensor) -> Tensor:
        """Whether this tensor and all before it are good, as `good` `()` says of this one."""
        before = self._good.get(good.device)
        self._good[good.device] = good = good if before is None else good & before
        return good


_pass: Pass | None = None


@contextmanager
def one_pass() -> Iterator[Pass]:
    """Let all calibrators that collect in the block leave out what comes after a bad batch."""
    global _pass
    outer, _pass = _pass, Pass()
    try:
        yield _pass
    finally:
        _pass = outer


def noted(
    fault: Tensor | None, finite: Tensor, least: Tensor, batches: int
) -> tuple[Tensor, Tensor]:
    """The fault of a calibrator after one more tensor, and whether that one counts; no waiting.

    Args:
        fault: That before; None at the start.
        finite: Boolean, `()`.
        least: float32, `()`; negative where that is an error.
        batches: The number of the tensor, where no pass counts batches.
    """
    batch = batches if _pass is None else _pass.batch
    new = torch.stack([finite.float(), least, torch.full_like(least, batch)])
    if fault is not None:
        new = torch.where(_is_good(fault), new, fault)
    good = _is_good(new)
    return new, good if _pass is None else _pass.valid(good)


def earliest_fault(calibrators: Sequence[Any]) -> tuple[int, CalibrationError] | None:
    """Which of the calibrators met the earliest bad batch, and the error; all forget theirs.

    Of one batch, the first in the order given. Each device is read once.
    """
    places: dict[torch.device, list[int]] = {}
    for i, calibrator in enumerate(calibrators):
        fault = getattr(calibrator, "_fault", None)
        if fault is not None:
            places.setdefault(fault.device, []).append(i)
    found = []
    for members in places.values():
        faults = torch.stack([calibrators[i]._fault for i in members]).tolist()
        found += [
            (batch, i, finite, least)
            for i, (finite, least, batch) in zip(members, faults, strict=True)
            if not (finite > 0 and least >= 0)
        ]
    for members in places.values():
        for i in members:
            calibrators[i]._fault = None
    if not found:
        return None
    batch, first, finite, least = min(found, key=lambda fault: fault[:2])
    where = f"with minimum {least:.6g} " if finite else ""
    where += f"in batch {batch:.0f} (counted from 0), all later ones left out too"
    return first, bad_values(bool(finite), where)


def raise_named(calibrators: dict[str, Any]) -> None:
    """Raise for the earliest bad batch that these calibrators met on an accelerator, once.

    Args:
        calibrators: By the names of their quantizers, in the order of the model.

    Raises:
        CalibrationError: naming the quantizer and the batch.
    """
    if found := earliest_fault(list(calibrators.values())):
        raise CalibrationError(f"{list(calibrators)[found[0]]}: {found[1]}") from found[1]


def _is_good(fault: Tensor) -> Tensor:
    """Whether a batch was finite and, where that matters, free of negative values."""
    return (fault[0] > 0) & (fault[1] >= 0)
