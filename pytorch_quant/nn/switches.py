"""The modes of a quantizer, and the methods that switch them."""

from __future__ import annotations

from typing import Any

from pytorch_quant.nn.range_parameter import RangeParameter


class QuantizerSwitches(RangeParameter):
    """Switches of `TensorQuantizer`; each changes the quantizer in place."""

    _disabled: bool
    _if_quant: bool
    _if_clip: bool
    _if_calib: bool
    _calibrator: Any
    _who: Any

    @property
    def disabled(self) -> bool:
        """Passes tensors through."""
        return self._disabled

    @property
    def quantizes(self) -> bool:
        """Whether it would quantize a tensor now."""
        return self._if_quant and not self._disabled

    @property
    def clips(self) -> bool:
        """Whether it would clip a tensor to the learned range now."""
        return self._if_clip and not self._disabled

    @property
    def collects(self) -> bool:
        """Whether it would show a tensor to its calibrator now."""
        return self._if_calib and not self._disabled

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
        if not self.learns_by_clip:
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
