"""Fewer bits step by step."""

from __future__ import annotations

from typing import Any

from torch import nn

from pytorch_quant.formats import make_format
from pytorch_quant.qat.selection import chosen


class GradualBits:
    """Lowers the bit width of a model while it trains; `gradual_bits` makes one.

    Attributes:
        bits: The width now.
    """

    def __init__(
        self, model: nn.Module, start: int, end: int, steps: int, activations: bool, weights: bool
    ) -> None:
        for width in (start, end):
            make_format(width)
        if not start >= end:
            raise ValueError(f"start must be at least end, got start={start} and end={end}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        found, _ = chosen(model, activations, weights, "gradual_bits")
        self._quantizers = [q for q in found.values() if isinstance(q.num_bits, int)]
        if not self._quantizers:
            raise ValueError("gradual_bits: the model has floating-point formats only")
        self._start, self._end, self._steps = start, end, steps
        self._done = 0
        self._apply()

    def step(self) -> int:
        """Count one step of the optimizer, and change the width where it is due.

        Returns:
            The width in bits.
        """
        self._done += 1
        if self._width() != self.bits:
            self._apply()
        return self.bits

    def state_dict(self) -> dict[str, Any]:
        """How many steps were made, and of which plan."""
        return {"done": self._done, **self._plan()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken; sets the width in the model.

        Raises:
            ValueError: the state is that of another plan.
        """
        for key, mine in self._plan().items():
            if state.get(key) != mine:
                raise ValueError(
                    f"the state is of gradual_bits with {key}={state.get(key)!r}, this one has "
                    f"{key}={mine!r}; make it with the same arguments"
                )
        self._done = int(state["done"])
        self._apply()

    def _plan(self) -> dict[str, int]:
        return {"start": self._start, "end": self._end, "steps": self._steps}

    def _width(self) -> int:
        widths = self._start - self._end + 1
        return max(self._start - self._done * widths // self._steps, self._end)

    def _apply(self) -> None:
        self.bits = self._width()
        for quantizer in self._quantizers:
            quantizer.num_bits = self.bits


def gradual_bits(
    model: nn.Module,
    start: int = 8,
    end: int = 4,
    *,
    steps: int,
    activations: bool = True,
    weights: bool = True,
) -> GradualBits:
    """Set the integer quantizers to `start` bits, in place, and lower them to `end` in training.

    Call `step()` of what is returned after each step of the optimizer. All widths from `start` to
    `end` get the same share of `steps`; amax stays, so that the steps of the grid widen.

    Args:
        model: Holds integer quantizers.
        start: The first width in bits.
        end: The last width in bits.
        steps: After how many steps of the optimizer the last width has had its share.
        activations: Those of activations.
        weights: Those of weights.

    Returns:
        What counts the steps; it has `state_dict` and `load_state_dict`.

    Raises:
        TypeError: a width that is no int.
        ValueError: a width out of range, `start` below `end`, no steps, or no integer quantizer.
    """
    return GradualBits(model, start, end, steps, activations, weights)
