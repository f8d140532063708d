"""The largest magnitude of every batch, in constant memory: their maximum, mean, moving average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pytorch_quant.calib.held_state import fill_fields

MOMENTUM = 0.9
FIELDS = ("largest", "total", "moving", "batches", "seen")


class Maxima:
    """Statistics of per-batch maxima, on the device of the values.

    Args:
        shape: That of an amax.
        device: Where the values are.

    Attributes:
        largest: float32, `shape`: the largest so far.
        total: float64 (float32 on MPS), `shape`: the sum over the batches.
        moving: Like `total`: `m = momentum * m + (1 - momentum) * maximum`, from the first
            batch's maximum on.
        batches: int64, `()`: tensors seen.
        seen: int64, `()`: values seen.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        exact = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
        with torch.inference_mode(False):
            self.largest = torch.zeros(shape, dtype=torch.float32, device=device)
            self.total = torch.zeros(shape, dtype=exact, device=device)
            self.moving = torch.zeros_like(self.total)
            self.batches = torch.zeros((), dtype=torch.int64, device=device)
            self.seen = torch.zeros_like(self.batches)

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
        exact = maximum.to(self.total.dtype)
        moved = torch.where(self.batches > 0, torch.lerp(exact, self.moving, momentum), exact)
        new: tuple[Tensor, ...] = (
            torch.maximum(self.largest, maximum),
            self.total + exact,
            moved,
            self.batches + 1,
            self.seen + numel,
        )
        if valid is not None:
            old = (self.largest, self.total, self.moving, self.batches, self.seen)
            new = tuple(torch.where(valid, n, o) for n, o in zip(new, old, strict=True))
        # One statement without a call: an interrupt comes before or after it.
        self.largest, self.total, self.moving, self.batches, self.seen = new

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
        self.largest, self.total, self.moving, self.batches, self.seen = (
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
