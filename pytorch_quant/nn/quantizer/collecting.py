"""The calibrator of a quantizer, and the range that comes of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pytorch_quant import axes
from pytorch_quant.axes import Axis
from pytorch_quant.calib import CalibrationError, Calibrator, HistogramCalibrator, MaxCalibrator
from pytorch_quant.nn.quantizer_state import QuantizerState


class Collecting(QuantizerState):
    """What `TensorQuantizer` does in calibration."""

    _calibrator: Calibrator | None

    @property
    def calibrator(self) -> Calibrator | None:
        """The calibrator; None for a dynamic quantizer."""
        return self._calibrator

    @calibrator.setter
    def calibrator(self, calibrator: Calibrator | None) -> None:
        self._calibrator = calibrator

    def fresh_calibrator(self, method: str) -> Calibrator:
        """A calibrator for this quantizer without statistics.

        Args:
            method: `"histogram"`, or `"max"` for maxima alone.

        Returns:
            One with the settings of the present calibrator, if that is of the same kind.
        """
        kind = HistogramCalibrator if method == "histogram" else MaxCalibrator
        present = self._calibrator
        if type(present) is not kind:
            return kind(*self._target())
        made = present.fresh()
        made.retarget(*self._target())
        return made

    def _target(self) -> tuple[int | tuple[int, int], Axis, bool]:
        # The blocks of a block quantizer reach the calibrator as the rows of a matrix.
        return self._num_bits, self._axis if self._block_size is None else 0, self._unsigned

    def _format_changed(self) -> None:
        calibrator = getattr(self, "_calibrator", None)
        if isinstance(calibrator, Calibrator):
            calibrator.retarget(*self._target())

    def collect(self, inputs: Tensor, calibrator: Calibrator | None = None) -> None:
        """Show a tensor to a calibrator, whatever the modes are.

        Args:
            inputs: What would come to the quantizer.
            calibrator: By default its own.

        Raises:
            CalibrationError: a tensor that calibration cannot use; what was collected is kept.
            RuntimeError: there is no calibrator, or the shape along the kept axis changed.
        """
        calibrator = self._calibrator if calibrator is None else calibrator
        if calibrator is None:
            raise RuntimeError("there is no calibrator to collect with")
        # The tensor itself, by which calibrators know that they meet the same one.
        values = inputs if self._pre_quant_scale is None else self.prescaled(inputs.detach())
        if self._block_size is not None:
            values = axes.to_groups(values.detach(), self._block_axis(), self._block_size)
        calibrator.collect(values)

    def _collect_named(self, inputs: Tensor) -> None:
        try:
            self.collect(inputs)
        except (RuntimeError, ValueError) as error:
            # Other subclasses, such as out of memory, keep their own form.
            if type(error) not in (CalibrationError, RuntimeError, ValueError):
                raise
            raise type(error)(f"{self._who()}: {error}") from error

    def load_calib_amax(self, *args: Any, **kwargs: Any) -> None:
        """Take amax from what the calibrator has collected.

        Args:
            *args: Arguments of the calibrator's `compute_amax`, such as the method.
            **kwargs: The same as keywords; `strict=False` makes the amax of a calibrator that saw
                nothing NaN instead of raising.

        Raises:
            RuntimeError: there is no calibrator, or it saw nothing.
        """
        strict = kwargs.pop("strict", True)
        if self._calibrator is None:
            raise RuntimeError(f"{self._who()} has no calibrator to load an amax from")
        amax = self._calibrator.compute_amax(*args, **kwargs)
        if amax is None:
            if strict:
                raise RuntimeError(
                    f"{self._who()}: Calibrator returned None; it has seen no tensor. "
                    "Run batches between enable_calib() and disable_calib(), or pass strict=False"
                )
            amax = torch.tensor(math.nan)
        self._store_amax(amax)
