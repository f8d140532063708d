"""What all calibrators share: how a batch is checked, and what a bad one does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytorch_quant.axes import Axis, canonical_axis
from pytorch_quant.calib.faults import earliest_fault, noted
from pytorch_quant.calib.histogram import bad_values
from pytorch_quant.calib.maxima import MOMENTUM, Maxima
from pytorch_quant.calib.observation import Observation, observe
from pytorch_quant.formats import make_format

# Fields of pickled calibrators of pytorch_quantization that mean the same here.
_EARLIER_OPTIONS = ("_track_amax", "_num_bins", "_skip_zeros", "_torch_hist")


class Calibrator:
    """Statistics of the values that a quantizer meets; a subclass says which.

    On the CPU bad values raise at once. On an accelerator that would stop the device for every
    batch: there the first bad batch and all later ones are left out, and `compute_amax` raises,
    once; asked again, it answers from the batches before. See `pytorch_quant.calib.faults` for
    calibrators that collect together.

    Args:
        num_bits: Integer width 2 to 16, or a floating-point pair such as `(4, 3)`.
        axis: The kept axis or axes; None is per tensor.
        unsigned: Negative values are an error.
        momentum: The weight of earlier batches in `moving_max`, 0 to 1.

    Raises:
        TypeError: `num_bits` or `axis` is of the wrong kind.
        ValueError: no such number format.
    """

    # Of the histogram that `_add` asks for.
    _bins: ClassVar[int | None] = None

    reductions: ClassVar[dict[str, str]] = {
        "largest": "max",
        "total": "sum",
        "moving": "first",
        "batches": "sum",
        "seen": "sum",
    }
    """How each entry of `state()` becomes that of all processes together; `first` is that of the
    first process that saw anything."""

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: Axis = None,
        unsigned: bool = False,
        *,
        momentum: float = MOMENTUM,
    ) -> None:
        self.momentum = self._made_momentum = momentum
        self._set_target(num_bits, axis, unsigned)
        self.reset()

    def _set_target(self, num_bits: int | tuple[int, int], axis: Axis, unsigned: bool) -> None:
        self._format = make_format(num_bits, unsigned)
        self._num_bits = tuple(num_bits) if isinstance(num_bits, (tuple, list)) else num_bits
        self._axis = canonical_axis(axis)
        self._unsigned = unsigned

    def retarget(self, num_bits: int | tuple[int, int], axis: Axis, unsigned: bool) -> None:
        """Serve a quantizer whose fields have changed.

        Statistics answer for any number of bits and are kept; another axis or sign needs others,
        and they are forgotten.

        Raises:
            TypeError, ValueError: As in the constructor.
        """
        same = self._axis == canonical_axis(axis) and self._unsigned == unsigned
        self._set_target(num_bits, axis, unsigned)
        if not same:
            self.reset()

    def reset(self) -> None:
        """Forget everything collected."""
        self._batches = 0
        self._maxima: Maxima | None = None
        # The method that `best` chose for this quantizer.
        self.best: str | None = None
        # Of the first bad batch on an accelerator; see pytorch_quant.calib.faults.
        self._fault: Tensor | None = None
        # What all processes hold alike; see pytorch_quant.ptq.sync.
        self._united: Any = None

    def fresh(self) -> Calibrator:
        """Another one with the settings it was made with, and without statistics."""
        made = copy.copy(self)
        made.momentum = getattr(self, "_made_momentum", self.momentum)
        made.reset()
        return made

    def snapshot(self) -> Callable[[], None]:
        """A function that brings back the statistics of this moment; no tensor is copied.

        Collecting replaces tensors and never writes to them, so references are enough. A subclass
        that writes to what it holds has to extend this.
        """
        parts = (self, self._maxima, getattr(self, "_histogram", None))
        held = [(part, dict(vars(part))) for part in parts if part is not None]

        def restore() -> None:
            for part, fields in held:
                part.__dict__ = dict(fields)

        return restore

    def collect(self, x: Tensor) -> None:
        """Add a batch of values to the statistics. An empty tensor adds nothing.

        Args:
            x: Any shape that has the kept axis, any dtype; values count as float32.

        Raises:
            CalibrationError: NaN or Inf, or negative values for an unsigned quantizer (on the
                CPU). Nothing of this batch is collected, all earlier statistics are kept.
            RuntimeError: the kept axis changed its size, or the device changed.
            ValueError: `x` does not have the kept axis.
        """
        with torch.inference_mode(False), torch.no_grad():
            if x.numel() == 0:
                return
            observation = observe(x, self._axis, self._bins)
            self._check_same(observation)
            valid = self._check_values(x, observation)
            if self._maxima is None:
                self._maxima = Maxima(observation.shape, x.device)
            self._add(x, observation, valid)
            if observation.host is not None:
                magnitude = observation.host.magnitude
                self._maxima.update_later(magnitude, observation.numel, self.momentum)
            else:
                self._maxima.update(observation.maximum, observation.numel, valid, self.momentum)
            self._batches += 1

    def settings(self) -> dict[str, Any]:
        """What two calibrators must have in common for their statistics to merge."""
        return {"axis": self._axis, "unsigned": bool(self._unsigned)}

    def merge(self, other: Any) -> None:
        """Add the statistics of another calibrator of the same kind and settings."""
        assert self._maxima is not None
        self._maxima.merge(other._maxima)
        if self.best != other.best:
            # Neither choice was made on all of the batches.
            self.best = None

    def share_above(self, amax: Tensor) -> float | None:
        """The share of the values seen above `amax`, of the shape of one; None if unknown."""
        none = self._maxima is not None and bool((self._maxima.largest <= amax).all())
        return 0.0 if none else None

    def mark_united(self) -> None:
        """Note that all processes hold these statistics, until they are replaced."""
        # A calibrator of the user's own may hand out the very tensors that it collects into.
        state = {key: tensor.clone() for key, tensor in self.state().items()}
        self._united = self._maxima, state

    def unmark_united(self) -> None:
        """Undo `mark_united`."""
        self._united = None

    def united_state(self) -> dict[str, Tensor] | None:
        """What all processes hold of these statistics; None if they are of this process alone."""
        maxima, state = getattr(self, "_united", None) or (None, None)
        # Statistics that were replaced since are those of this process again.
        return state if maxima is self._maxima else None

    def compute_amax(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The amax of the statistics so far.

        Returns:
            float32, real units, `()` per tensor, else 1 in all axes but the kept ones; None if no
            values were seen.
        """
        raise NotImplementedError

    @property
    def seen(self) -> int:
        """Values collected so far."""
        return 0 if self._maxima is None else int(self._maxima.seen)

    @property
    def amax_shape(self) -> tuple[int, ...] | None:
        """The shape of the amax; None before any values."""
        return None if self._maxima is None else self._maxima.shape

    def state(self) -> dict[str, Tensor]:
        """The statistics as plain tensors, empty before any values; `load_state` reads them.

        Raises:
            CalibrationError: a bad batch was met on an accelerator.
        """
        self._raise_deferred()
        return {} if self._maxima is None else self._maxima.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Replace the statistics by the result of `state`.

        Raises:
            ValueError: the state is not that of such a calibrator.
        """
        maxima = Maxima.from_state(state) if state else None
        self.reset()
        self._maxima = maxima

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle; one of pytorch_quantization lacks most of the fields."""
        if "_format" in state:
            self.__dict__.update(state)
            return
        self.momentum = MOMENTUM
        self.__dict__.update({k: state[k] for k in _EARLIER_OPTIONS if k in state})
        self._set_target(state["_num_bits"], state["_axis"], state["_unsigned"])
        self.reset()
        self._take_over(state)

    def _take_over(self, state: dict[str, Any]) -> None:
        """Take the statistics out of the state of an earlier program."""
        raise NotImplementedError

    def __repr__(self) -> str:
        fields = f"num_bits={self._num_bits}, axis={self._axis}, unsigned={self._unsigned}"
        return f"{type(self).__name__}({fields})"

    def _add(self, x: Tensor, observation: Observation, valid: Tensor | None) -> None:
        """Collect more than the maxima."""

    def _check_same(self, observation: Observation) -> None:
        if self._maxima is None:
            return
        held = self._maxima
        if held.device != observation.device:
            raise RuntimeError(
                f"the device changed between batches, from {held.device} to "
                f"{observation.device}; collect on one device, or reset the calibrator"
            )
        if held.shape != observation.shape:
            raise RuntimeError(
                f"the amax shape changed between batches, from {held.shape} to "
                f"{observation.shape}; axis {self._axis} must keep its size: use "
                "axis=None, or reset the calibrator"
            )

    def _check_values(self, x: Tensor, observation: Observation) -> Tensor | None:
        if observation.host is not None:
            host = observation.host
            self._raise_if_bad(x, math.isfinite(host.magnitude), host.low)
            return None
        finite = observation.maximum.isfinite().all()
        least = observation.least if self._unsigned else torch.zeros_like(observation.least)
        if observation.on_host:
            self._raise_if_bad(x, bool(finite), float(least))
            return None
        self._fault, valid = noted(self._fault, finite, least, self._batches)
        return valid

    def _raise_if_bad(self, x: Tensor, finite: bool, least: float) -> None:
        if not finite:
            # As float32, beyond whose range a float64 lies that is finite itself.
            bad = x.numel() - int(x.float().isfinite().sum())
            raise bad_values(False, f"in {bad} of {x.numel()} values")
        if self._unsigned and least < 0:
            raise bad_values(True, f"with minimum {least:.6g}")

    def _raise_deferred(self) -> None:
        """Raise for a bad batch that was met on an accelerator, once."""
        if found := earliest_fault([self]):
            raise found[1]
