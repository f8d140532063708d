"""`TensorQuantizer`: the one module that quantizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytorch_quant import axes, qdq, qdq_blocks, qdq_dynamic
from pytorch_quant.axes import Axis
from pytorch_quant.calib import Calibrator
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.exporting import exporting, exporting_to_onnx
from pytorch_quant.fake_quant import (
    fake_quantize,
    fake_quantize_dynamic,
    quantize,
    torch_fake_quantize,
)
from pytorch_quant.formats import Format, IntFormat, make_format
from pytorch_quant.learned_range import learned_fake_quantize
from pytorch_quant.nn.clip import Clip
from pytorch_quant.nn.compiled import left_alone, refuse_calibration
from pytorch_quant.nn.locate import calling_model, name_in
from pytorch_quant.nn.quantizer.collecting import Collecting
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

    _kept: Any = None
    """The `KeptWeights` of a weight quantizer while `cached_weights` holds it."""

    _write_pair: Callable[[Tensor], Tensor] | None = None
    """Set while `export_onnx` runs, which holds the range already."""

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
        amax = self.amax
        return None if amax is None else self._scaled(amax).float() / self.format.bound

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

    def _scaled(self, amax: Tensor) -> Tensor:
        # The clip of a learned range has the factor in it from the start.
        if self._scale_amax is None or self.learns_by_clip:
            return amax
        return amax * self._scale_amax

    def _effective_amax(self, inputs: Tensor, axis: Axis) -> Tensor:
        amax = self._range_in_use(None if self.learned_range is not None else self.amax)
        if amax is None:
            return self._scaled(axes.reduce_amax(inputs.detach(), axis).float())
        if amax.device != inputs.device:
            raise RuntimeError(
                f"{self._who()}: the input is on {inputs.device}, amax on {amax.device}; "
                "move the model or the batch so that both are on one device"
            )
        amax = self._scaled(amax.float())
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

    def _amax_to_write(self, inputs: Tensor, axis: Axis) -> Tensor:
        """As `_effective_amax` while an exporter traces, with its values if they are known."""
        if torch.jit.is_tracing():
            with qdq.meant_as_constants():
                return self._effective_amax(inputs, axis)
        if not self.calibrated:
            return self._effective_amax(inputs, axis)
        with with_values(self) as known:
            if known:
                return self._effective_amax(inputs, axis)
        return self._effective_amax(inputs, axis)

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
        if self._kept is not None:
            return self._kept.quantized(self, lambda: inputs, (inputs,))
        return self._process(inputs)

    def _process(self, inputs: Tensor) -> Tensor:
        if self._if_calib and not (self._disabled or exporting_to_onnx()):
            if torch.compiler.is_dynamo_compiling():
                refuse_calibration()
            left_alone(self._collect_named)(inputs)
        # A pre-quantization scale is undone in the weight, so it acts on a disabled quantizer too.
        if self._pre_quant_scale is not None:
            inputs = self.prescaled(inputs)
        if self._disabled:
            return inputs
        if self._range_momentum is not None and self.training:
            self._follow(inputs)
        if self._if_clip:
            inputs = self.clip(inputs)
        if self._if_quant:
            inputs = self._quantize(inputs)
        return inputs

    def _quantize(self, inputs: Tensor) -> Tensor:
        try:
            if self._block_size is None:
                return self._quantize_values(inputs, self._axis)
            to_onnx = exporting_to_onnx()
            if to_onnx and self._write_pair is not None:
                return self._write_pair(inputs)
            if to_onnx:
                qdq_blocks.check_blocks(inputs, self._block_axis(), self._block_size)
            rows = axes.to_groups(inputs, self._block_axis(), self._block_size)
            if to_onnx:
                if self.needs_amax:
                    self._refuse_export()
                grid, amax = (self._block_axis(), self._block_size), self._amax_to_write(rows, 0)
                return qdq_blocks.quantize_dequantize_blocks(
                    inputs, amax, *grid, self.format, scale_dtype=_scale_dtype(inputs)
                )
            rows = self._quantize_values(rows, 0)
            return axes.from_groups(rows, inputs.shape, self._block_axis())
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self._who()}: {error}") from error

    def _quantize_values(self, inputs: Tensor, axis: Axis) -> Tensor:
        to_onnx = exporting_to_onnx()
        if self._dynamic:
            if to_onnx:
                return qdq_dynamic.dynamic_quantize_dequantize(inputs)
            return fake_quantize_dynamic(inputs)
        axes.kept_axes(axis, inputs.dim())
        if to_onnx and self._write_pair is not None:
            return self._write_pair(inputs)
        if (to_onnx or exporting()) and self.needs_amax:
            self._refuse_export()
        amax = self._amax_to_write(inputs, axis) if to_onnx else self._effective_amax(inputs, axis)
        if self._block_size is not None and amax.dim():
            amax = amax.reshape(-1, 1)
        if not self._fake_quant:
            return quantize(inputs, amax, self.format)[0]
        dtype = _scale_dtype(inputs)
        if to_onnx:
            axis = self._amax_axis(amax, axis)
            return qdq.quantize_dequantize(inputs, amax, axis, self.format, scale_dtype=dtype)
        if self._range_method is not None:
            method, weight = self._range_method, self._range_of_weight
            form = self.format
            return learned_fake_quantize(
                inputs, amax, form, method, weight=weight, scale_dtype=dtype
            )
        if self.use_fb_fake_quant and isinstance(self.format, IntFormat):
            return torch_fake_quantize(inputs, amax, self._amax_axis(amax, axis), self.format)
        return fake_quantize(inputs, amax, self.format, scale_dtype=dtype)

    def _amax_axis(self, amax: Tensor, axis: Axis) -> Axis:
        """The axis that `amax` varies along: the stored one, unless amax was replaced."""
        if amax.dim() == 0:
            return None
        if axis is not None:
            return axis
        varying = [a for a, n in enumerate(amax.shape) if n != 1]
        return varying[0] if len(varying) == 1 else tuple(varying) or None

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


def _scale_dtype(inputs: Tensor) -> torch.dtype:
    # Under autocast the half-precision tensors are temporary: the exported model is float32.
    autocast = torch.is_autocast_enabled(inputs.device.type)
    return torch.float32 if autocast else inputs.dtype
