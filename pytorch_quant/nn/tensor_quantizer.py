"""`TensorQuantizer`: the one module that quantizes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytorch_quant import axes, qdq
from pytorch_quant.axes import Axis
from pytorch_quant.calib import Calibrator
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.exporting import exporting, exporting_to_onnx
from pytorch_quant.formats import Format, make_format
from pytorch_quant.nn.clip import Clip
from pytorch_quant.nn.compiled import left_alone, refuse_calibration
from pytorch_quant.nn.locate import calling_model, name_in
from pytorch_quant.nn.quantizer.collecting import Collecting
from pytorch_quant.nn.quantizer.entered import Entered
from pytorch_quant.nn.quantizer.ways import way_of
from pytorch_quant.traced_values import with_values


class TensorQuantizer(Collecting):
    """Quantizes the tensor that passes through it.

    What it does is the sum of its modes: collect statistics for calibration, clip, quantize; or
    nothing at all when disabled. Uncalibrated, it takes the range of each tensor it meets.

    Args:
        quant_desc: How to quantize.
        disabled: Pass tensors through untouched.
        if_quant: Quantize.
        if_clip: Clip to the learned range.
        if_calib: Collect statistics.
    """

    use_fb_fake_quant: ClassVar[bool] = False
    """Compute with torch's own `fake_quantize_per_*_affine`; also settable on one instance."""

    def __init__(
        self,
        quant_desc: QuantDescriptor | None = None,
        disabled: bool = False,
        if_quant: bool = True,
        if_clip: bool = False,
        if_calib: bool = False,
    ) -> None:
        desc = QuantDescriptor() if quant_desc is None else quant_desc
        if not isinstance(desc, QuantDescriptor):
            raise TypeError(f"a TensorQuantizer takes a QuantDescriptor, got {quant_desc!r}")
        super().__init__(desc, disabled, if_quant, False, if_calib)
        if desc.learn_amax:
            init_amax = 1.0 if desc.amax is None else float(desc.amax.item())
            init_amax *= desc.scale_amax or 1.0
            low = 0.0 if desc.unsigned else -init_amax
            self.clip = Clip(low, init_amax, learn_min=True, learn_max=True)
        if desc.learn_amax or if_clip:
            self.enable_clip()
        self._calibrator: Calibrator | None = None
        if not desc.dynamic:
            self._calibrator = self.fresh_calibrator(desc.calib_method)

    @property
    def amax(self) -> Tensor | None:
        """See `QuantizerState.amax`."""
        if self.learned_range is not None:
            learned = self._learned_amax()
            return None if learned is None else learned.detach()
        if self.learns_by_clip:
            clip = self.clip
            return torch.maximum(-clip.clip_value_min, clip.clip_value_max).detach()
        return getattr(self, "_amax", None)

    @amax.setter
    def amax(self, value: Any) -> None:
        self._set_amax(value)
        if self._learn_amax and value is not None:
            self.init_learn_amax()

    @property
    def format(self) -> Format:
        """The number format of the codes."""
        return make_format(self._num_bits, self._unsigned, self._narrow_range)

    @property
    def maxbound(self) -> float:
        """The code that amax maps to."""
        return self.format.bound

    @property
    def step_size(self) -> Tensor | None:
        """`amax / bound`, float32, real units per step; None when uncalibrated."""
        amax = self.amax_in_use
        return None if amax is None else amax / self.format.bound

    @property
    def scale(self) -> Tensor | None:
        """The same as `step_size`."""
        return self.step_size

    @property
    def needs_amax(self) -> bool:
        """Whether it would quantize, and an export has no range to write for it."""
        return self.quantizes and not (self.calibrated or self.use_fb_fake_quant)

    # Ranges

    def set_range(self, amax: Tensor) -> None:
        """Quantize with `amax` from now on, where a learned range starts, too.

        What calibration and rewritten weights give; a user's own value is checked by the property
        `amax`. An amax in place stays the same tensor if it has that shape.

        Args:
            amax: Of the shape that `amax` has. NaN stands for what no batch reached.

        Raises:
            RuntimeError: the range is that of a clip, which has one value.
        """
        self._store_amax(amax)
        if self._learn_amax:
            self.init_learn_amax()

    def init_learn_amax(self) -> None:
        """Start the learned range from the amax that calibration gave.

        Raises:
            RuntimeError: the quantizer has no learned range, or no amax.
        """
        if self._range_method is not None and self.amax is not None:
            return self._start_learning()
        if not self._learn_amax:
            raise RuntimeError(f"{self._who()} was not made with learn_amax=True")
        amax = getattr(self, "_amax", None)
        if amax is None or amax.numel() != 1:
            raise RuntimeError(
                f"{self._who()}: a learned range starts from one calibrated amax, got "
                f"{'none' if amax is None else f'shape {tuple(amax.shape)}'}; calibrate first"
            )
        with torch.no_grad():
            value = amax.reshape(()) * (self._scale_amax or 1.0)
            self.clip.clip_value_max.copy_(value)
            self.clip.clip_value_min.copy_(value * 0 if self._unsigned else -value)

    @property
    def amax_in_use(self) -> Tensor | None:
        """`amax` times `scale_amax`, float32, which is what it quantizes with."""
        amax = self.amax
        return None if amax is None else self._scaled(amax).float()

    def _scaled(self, amax: Tensor) -> Tensor:
        # The clip of a learned range has the factor in it from the start.
        if self._scale_amax is None or self.learns_by_clip:
            return amax
        return amax * self._scale_amax

    def _range_for(self, inputs: Tensor, axis: Axis, given: Tensor | None = None) -> Tensor:
        """The range in the shape in which it broadcasts against `inputs`.

        Args:
            inputs: What is rounded.
            axis: Its kept axis.
            given: A range to take in the place of the quantizer's own, as calibration gives it.
        """
        if given is not None:
            amax: Tensor | None = given * (self._scale_amax or 1.0)
        else:
            amax = self._range_in_use(None if self.learned_range is not None else self.amax)
            amax = None if amax is None else self._scaled(amax.float())
        if amax is None:
            return self._scaled(axes.reduce_amax(inputs.detach(), axis).float())
        if amax.device != inputs.device:
            raise RuntimeError(
                f"{self._who()}: the input is on {inputs.device}, amax on {amax.device}; "
                "move the model or the batch so that both are on one device"
            )
        if not amax.dim() or self._block_size is not None:
            return amax
        # The stored axis decides where the values lie; broadcasting would guess.
        kept = axes.amax_shape(inputs.shape, axis) if axis is not None else tuple(amax.shape)
        if amax.numel() == 1:
            return amax.reshape(())
        if amax.numel() == math.prod(kept) and len(kept) == inputs.dim():
            return amax.reshape(kept)
        raise ValueError(
            f"an amax of shape {tuple(amax.shape)} does not fit an input of shape "
            f"{tuple(inputs.shape)} with axis={axis}; calibrate again, or set an amax of shape "
            f"{axes.amax_shape(inputs.shape, axis)}"
        )

    def _range_to_write(self, inputs: Tensor, axis: Axis) -> Tensor:
        """As `_range_for` while an exporter traces, with its values if they are known."""
        if self.needs_amax:
            self._refuse_export()
        if torch.jit.is_tracing():
            with qdq.meant_as_constants():
                return self._range_for(inputs, axis)
        if not self.calibrated:
            return self._range_for(inputs, axis)
        with with_values(self) as known:
            if known:
                return self._range_for(inputs, axis)
        return self._range_for(inputs, axis)

    # Forward

    def forward(self, inputs: Tensor) -> Tensor:
        """Collect, clip and quantize `inputs`, as the modes say.

        Args:
            inputs: Any shape, floating point.

        Returns:
            The shape and dtype of `inputs`: fake-quantized values, or codes with
            `fake_quant=False`.

        Raises:
            CalibrationError: a tensor that calibration cannot use; what was collected is kept.
            RuntimeError: wrong device, or an export without an amax.
            TypeError: a dtype that cannot be quantized.
            ValueError: the axis does not exist in `inputs`, or negative values in the unsigned
                integer form.
        """
        if self._handlers:
            return self._within(self._handlers)(inputs)
        return self._process(inputs)

    def _process(self, inputs: Tensor) -> Tensor:
        if self._if_calib and not (self._disabled or exporting_to_onnx()):
            if torch.compiler.is_dynamo_compiling():
                refuse_calibration()
            left_alone(self._collect_named)(inputs)
        if self._disabled:
            # A pre-quantization scale is undone in the weight, so it acts even so.
            return self.prescaled(inputs)
        if self._range_momentum is not None and self.training:
            self._follow(inputs)
        return self._quantize(inputs) if self._if_quant else self.reaching(inputs)

    def reaching(self, x: Tensor) -> Tensor:
        """What reaches the rounding: `x` times the pre-quantization scale, clipped."""
        x = self.prescaled(x)
        return self.clip(x) if self._if_clip else x

    def entering(self, x: Tensor, amax: Tensor | None = None) -> Entered:
        """The values, rows, range and scale with which `forward` quantizes `x`.

        Args:
            x: As it comes to the quantizer.
            amax: A range to take in the place of its own, such as `calibrator.compute_amax` gives.

        Raises:
            RuntimeError: wrong device.
            ValueError: the axis or the range does not fit `x`.
        """
        return way_of(self).enter(self, self.reaching(x), amax)

    def leaving(self, entered: Entered) -> Tensor:
        """What `forward` makes of a tensor that has entered."""
        return way_of(self).quantize(self, entered)

    def _quantize(self, inputs: Tensor) -> Tensor:
        try:
            if exporting_to_onnx():
                return way_of(self).write(self, self.reaching(inputs))
            if exporting() and self.needs_amax:
                self._refuse_export()
            return self.leaving(self.entering(inputs))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self._who()}: {error}") from error

    def _refuse_export(self) -> None:
        model = calling_model(self)
        members = model.modules() if model is not None else [self]
        names = [
            name_in(model, m) if model is not None else self._who()
            for m in members
            if isinstance(m, TensorQuantizer) and m.needs_amax
        ]
        raise uncalibrated_error(names)


def uncalibrated_error(names: list[str]) -> RuntimeError:
    """The error of an export that meets quantizers without a range."""
    weights = all("_weight_quantizer" in name for name in names)
    hint = " Weights need no data: calib.calibrate_weights(model, 'max')." if weights else ""
    return RuntimeError(
        f"export of {len(names)} uncalibrated quantizer(s): {', '.join(names)}. "
        f"Calibrate them, disable() them, or declare them QuantDescriptor(dynamic=True).{hint}"
    )
