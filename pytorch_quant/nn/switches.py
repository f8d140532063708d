"""The modes of a quantizer and the methods that switch them."""

from __future__ import annotations

from typing import Any


class QuantizerSwitches:
    """Switches of `TensorQuantizer`; each changes the quantizer in place."""

    _disabled: bool
    _if_quant: bool
    _if_clip: bool
    _if_calib: bool
    _learn_amax: bool
    _range_method: Any
    _calibrator: Any
    _who: Any

    def disable(self) -> None:
        """Pass tensors through."""
        self._disabled = True

    def enable(self) -> None:
        """Undo `disable`."""
        self._disabled = False

    def disable_clip(self) -> None:
        """Stop clipping."""
        self._if_clip = False

    def enable_clip(self) -> None:
        """Clip to the learned range.

        Raises:
            RuntimeError: the quantizer has no learned range.
        """
        if not self._learn_amax or self._range_method is not None:
            raise RuntimeError(
                f"{self._who()}: clipping needs a learned range; construct it with "
                "QuantDescriptor(learn_amax=True)"
            )
        self._if_clip = True

    def disable_calib(self) -> None:
        """Stop collecting statistics."""
        self._if_calib = False

    def enable_calib(self) -> None:
        """Collect statistics of every tensor that passes.

        Raises:
            RuntimeError: the quantizer has no calibrator.
        """
        if self._calibrator is None:
            raise RuntimeError(
                f"{self._who()} has no calibrator (a dynamic quantizer ranges itself); "
                "assign one to _calibrator, or leave it out of the calibration"
            )
        self._if_calib = True

    def disable_quant(self) -> None:
        """Stop quantizing."""
        self._if_quant = False

    def enable_quant(self) -> None:
        """Quantize."""
        self._if_quant = True
