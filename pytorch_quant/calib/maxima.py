"""The largest magnitude of every batch, in constant memory: their maximum, mean, moving average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pytorch_quant.calib.held_state import fill_fields

MOMENTUM = 0.9
_MOST_WAITING = 64
_Held = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
FIELDS = ("largest", "total", "moving", "batches", "seen")


class Maxima:
    """Statistics of per-batch maxima, on the device of the values.

    Args:
        shape: That of an amax.
        device: Where the values are.

    Attributes:
        shape: As given.
        largest: float32, `shape`: the largest so far.
        total: float64 (float32 on MPS), `shape`: the sum over the batches.
        moving: Like `total`: `m = momentum * m + (1 - momentum) * maximum`, from the first
            batch's maximum on.
        batches: int64, `()`: tensors seen.
        seen: int64, `()`: values seen.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        exact = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
        self.shape = shape
        with torch.inference_mode(False):
            zeros = torch.zeros(shape, dtype=exact, device=device)
            count = torch.zeros((), dtype=torch.int64, device=device)
            largest = torch.zeros_like(zeros, dtype=torch.float32)
            self._held: _Held = largest, zeros, zeros.clone(), count, count.clone()
        self._waiting: tuple[tuple[float, int, float], ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self._held[0].device

    @property
    def largest(self) -> Tensor:
        """The largest so far."""
        return self._settled()[0]

    @property
    def total(self) -> Tensor:
        """The sum over the batches."""
        return self._settled()[1]

    @property
    def moving(self) -> Tensor:
        """The moving average."""
        return self._settled()[2]

    @property
    def batches(self) -> Tensor:
        """Tensors seen."""
        return self._settled()[3]

    @property
    def seen(self) -> Tensor:
        """Values seen."""
        return self._settled()[4]

    def update(
        self, maximum: Tensor, numel: int, valid: Tensor | None = None, momentum: float = MOMENTUM
    ) -> None:
        """Add a batch.

        Args:
            maximum: float32, the shape of an amax.
            numel: Values of the batch.
            valid: Boolean, shape `()`; where it is false the batch is left out.
            momentum: The weight of what was there in the moving average, 0 to 1.
        """
        old = self._settled()
        largest, total, moving, batches, seen = old
        exact = maximum.to(total.dtype)
        moved = torch.where(batches > 0, torch.lerp(exact, moving, momentum), exact)
        new = torch.maximum(largest, maximum), total + exact, moved, batches + 1, seen + numel
        if valid is not None:
            a, b, c, d, e = (torch.where(valid, n, o) for n, o in zip(new, old, strict=True))
            new = a, b, c, d, e
        # Replaced as a whole: an interrupt comes before or after it.
        self._held = new

    def update_later(self, maximum: float, numel: int, momentum: float = MOMENTUM) -> None:
        """Add a batch of maxima of shape `()` on the CPU; see `update`.

        Small tensors are slow amid a forward pass. These wait as numbers until somebody looks, or
        there are many.
        """
        self._waiting = (*self._waiting, (maximum, numel, momentum))
        if len(self._waiting) >= _MOST_WAITING:
            self._settled()

    def _settled(self) -> _Held:
        """The statistics, with all that waited."""
        if not self._waiting:
            return self._held
        largest, total, moving, batches, seen = (tensor.item() for tensor in self._held)
        for maximum, numel, momentum in self._waiting:
            largest, total = max(largest, maximum), total + maximum
            moving = momentum * moving + (1 - momentum) * maximum if batches else maximum
            batches, seen = batches + 1, seen + numel
        with torch.inference_mode(False):
            numbers = zip(self._held, (largest, total, moving, batches, seen), strict=True)
            a, b, c, d, e = (torch.full_like(old, number) for old, number in numbers)
        self._held, self._waiting = (a, b, c, d, e), ()
        return self._held

    def amax(self, method: str) -> Tensor:
        """`max`, `mean_max` or `moving_max` of what was seen; float32."""
        if method == "max":
            return self.largest.clone()
        if method == "mean_max":
            return (self.total / self.batches).float()
        return self.moving.float()

    def merge(self, other: Maxima) -> None:
        """Add the batches of another. The moving average of the two weighs them by batches."""
        both = self.batches + other.batches
        share = (other.batches / both.clamp(min=1)).to(self.moving.dtype)
        self._held = (
            torch.maximum(self.largest, other.largest),
            self.total + other.total,
            torch.lerp(self.moving, other.moving, share),
            both,
            self.seen + other.seen,
        )

    def state(self) -> dict[str, Tensor]:
        """All that is held, as plain tensors; `from_state` reads it back."""
        return {field: getattr(self, field).clone() for field in FIELDS}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Maxima:
        """Build from the result of `state`.

        Raises:
            ValueError: an entry is missing, or the shapes do not belong together.
        """
        largest = state.get("largest")
        if largest is None:
            raise ValueError("the state of maxima holds their largest")
        made = cls(tuple(largest.shape), largest.device)
        fill_fields(made, FIELDS, state, f"maxima of shape {tuple(largest.shape)}")
        return made
