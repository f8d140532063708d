"""The fields and buffers of a quantizer: what is stored, copied, saved and loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.axes import Axis, canonical_axis, fits_axis
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.formats import make_format
from pytorch_quant.nn.locate import qualified_name
from pytorch_quant.nn.switches import QuantizerSwitches

_BUFFERS = ("_amax", "_pre_quant_scale")
# Fields that pickles of older programs do not have.
_LATER_FIELDS = {
    "_name": None,
    "_block_size": None,
    "_dynamic": False,
    "_fixed": False,
    "_narrow_range": False,
    "_calibrator": None,
}


class QuantizerState(QuantizerSwitches):
    """Holds what a quantizer is; `TensorQuantizer` adds what it does.

    The buffers `_amax` and `_pre_quant_scale` exist from the moment they are set, so that
    `hasattr(quantizer, "_amax")` tells whether it is calibrated, and are created by loading a
    checkpoint that has them.
    """

    _pre_quant_scale: Tensor | None
    _place: Tensor

    def __init__(
        self,
        desc: QuantDescriptor,
        disabled: bool,
        if_quant: bool,
        if_clip: bool,
        if_calib: bool,
    ) -> None:
        super().__init__()
        # Where a buffer that is loaded or computed belongs. As a buffer itself it follows .to(),
        # map_location and copies; it holds nothing and is not saved.
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self._name = desc.name
        self._num_bits = desc.num_bits
        self._fake_quant = desc.fake_quant
        self._axis = desc.axis
        self._learn_amax = desc.learn_amax
        self._scale_amax = desc.scale_amax
        self._unsigned = desc.unsigned
        self._narrow_range = desc.narrow_range
        self._block_size = desc.block_size
        self._dynamic = desc.dynamic
        self._disabled = disabled
        self._if_quant = if_quant
        self._if_clip = if_clip
        self._if_calib = if_calib
        self._fixed = desc.amax is not None and not desc.learn_amax
        self.register_buffer("_pre_quant_scale", None)
        if desc.amax is not None:
            self._store_amax(torch.from_numpy(desc.amax.copy()))

    # Properties

    @property
    def buffer_device(self) -> torch.device:
        """Where its buffers are, or would be."""
        return self._place.device

    def _who(self) -> str:
        """The name for messages: that in the running model, else the descriptor's."""
        found = qualified_name(self)
        return self._name if self._name and found == type(self).__name__ else found

    def _block_axis(self) -> int:
        assert isinstance(self._axis, int)
        return self._axis

    def _format_changed(self) -> None:
        """Called when a field changes that statistics depend on."""

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """Integer width, or the (exponent, mantissa) pair of a floating-point format."""
        return self._num_bits

    @num_bits.setter
    def num_bits(self, value: int | tuple[int, int]) -> None:
        make_format(value, self._unsigned, self._narrow_range)
        self._num_bits = (value[0], value[1]) if isinstance(value, (tuple, list)) else value
        self._format_changed()

    @property
    def unsigned(self) -> bool:
        """Codes from 0 up."""
        return self._unsigned

    @unsigned.setter
    def unsigned(self, value: bool) -> None:
        make_format(self._num_bits, bool(value), self._narrow_range)
        self._unsigned = bool(value)
        self._format_changed()

    @property
    def narrow_range(self) -> bool:
        """The lowest signed code is not used."""
        return self._narrow_range

    @property
    def fake_quant(self) -> bool:
        """Real values come out; if false, codes."""
        return self._fake_quant

    @property
    def axis(self) -> Axis:
        """The kept axis; None per tensor."""
        return self._axis

    @axis.setter
    def axis(self, value: Axis) -> None:
        self._axis = canonical_axis(value)
        self._format_changed()

    @property
    def dynamic(self) -> bool:
        """Ranged at run time by design."""
        return self._dynamic

    @property
    def fixed(self) -> bool:
        """Calibration leaves the amax: the descriptor fixes it, or what the weights rest on."""
        return self._fixed

    @fixed.setter
    def fixed(self, value: bool) -> None:
        self._fixed = value

    @property
    def block_size(self) -> int | None:
        """How many entries of `axis` share a value of amax; None without blocks."""
        return self._block_size

    @property
    def scale_amax(self) -> float | None:
        """The factor on a calibrated amax; None stands for 1."""
        return self._scale_amax

    @property
    def amax(self) -> Tensor | None:
        """The magnitude that maps to the largest code, real units; None when uncalibrated.

        Float32, shape `()`, or the rank of the input with 1 in all axes but the kept ones. Where
        a range is learned, the range as it stands.
        """
        return getattr(self, "_amax", None)

    @amax.setter
    def amax(self, value: Any) -> None:
        self._set_amax(value)

    def _set_amax(self, value: Any) -> None:
        if value is None:
            if hasattr(self, "_amax"):
                del self._amax
            return
        amax = torch.as_tensor(value, dtype=torch.float32)
        check_amax(amax, f"{self._who()}: amax")
        if self._block_size is None and not fits_axis(amax.shape, self._axis):
            raise ValueError(
                f"{self._who()}: an amax of shape {tuple(amax.shape)} does not fit "
                f"axis={self._axis}; give one value, or one along the kept axis"
            )
        self._store_amax(amax)

    @property
    def pre_quant_scale(self) -> Tensor | None:
        """What the input is multiplied by first; None stands for 1."""
        return self._pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Any) -> None:
        if value is None:
            self._pre_quant_scale = None
            return
        scale = torch.as_tensor(value, dtype=torch.float32).detach().clone()
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"{self._who()}: pre_quant_scale must be finite, got {value}")
        self._pre_quant_scale = scale.to(self.buffer_device)

    def prescaled(self, x: Tensor) -> Tensor:
        """`x` times `pre_quant_scale`, in its dtype; what a disabled quantizer gives."""
        scale = self._pre_quant_scale
        return x if scale is None else x * scale.to(x.dtype)

    @property
    def calibrated(self) -> bool:
        """Whether there is a range to quantize with."""
        return self._dynamic or self.learns_by_clip or self.amax is not None

    # Buffers

    def _store_amax(self, amax: Tensor) -> None:
        """Make `amax` the buffer; in place where one of that shape exists."""
        self._changed()
        with torch.inference_mode(False), torch.no_grad():
            device = self.buffer_device if amax.device.type == "cpu" else amax.device
            amax = amax.detach().to(device, torch.float32)
            if self._axis is None and self._block_size is None and amax.numel() == 1:
                amax = amax.reshape(())
            if self._write_range(amax):
                return
            current = getattr(self, "_amax", None)
            if current is not None and current.shape == amax.shape and current.device == device:
                current.data.copy_(amax)
            else:
                self._amax = amax.clone()

    def __setattr__(self, name: str, value: Any) -> None:
        self._changed()
        if name != "_amax" or isinstance(value, nn.Parameter):
            super().__setattr__(name, value)
            return
        if value is not None and self._write_range(value):
            return
        # An `_amax` that is assigned has to become a buffer, to be saved and moved.
        self._parameters.pop(name, None)
        self.__dict__.pop(name, None)
        self._buffers.pop(name, None)
        if value is not None:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
            self.register_buffer(name, tensor.to(torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._changed()
        exact, learned = self._buffers.get("_amax"), self.learned_range
        exact_learned = None if learned is None else learned.detach()
        super()._apply(fn, recurse)
        self._keep_range_exact(exact_learned)
        moved = self._buffers.get("_amax")
        if exact is not None and moved is not None and moved.dtype != exact.dtype:
            # half() is about the arithmetic of layers: a rounded range would move every code.
            self._buffers["_amax"] = exact.to(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._changed()
        refused = {}
        state_dict = self._in_own_shape(state_dict, prefix)
        for buffer in _BUFFERS:
            key = prefix + buffer
            loaded = state_dict.get(key)
            if loaded is None:
                continue
            problem = self._prepare_buffer(buffer, key, loaded)
            if problem:
                error_msgs.append(problem)
                refused[key] = loaded
        kept = {k: v for k, v in state_dict.items() if k.startswith(prefix) and k not in refused}
        for key in (prefix + name for name in _BUFFERS):
            if key in kept and kept[key].dtype != torch.float32:
                kept[key] = kept[key].float()
        super()._load_from_state_dict(
            kept, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for key in refused:
            if key in missing_keys:
                missing_keys.remove(key)

    def _prepare_buffer(self, buffer: str, key: str, loaded: Tensor) -> str | None:
        """Make room for a loaded buffer; returns what is wrong with it, if anything."""
        present = getattr(self, buffer, None)
        if buffer == "_amax":
            # NaN stands for a quantizer that calibration did not reach.
            if not loaded.is_meta and bool((loaded < 0).any()):
                return f"{key}: amax must be >= 0, got a minimum of {float(loaded.min()):.6g}"
            fits = self._block_size is not None or fits_axis(loaded.shape, self._axis)
            scalars = present is not None and present.numel() == loaded.numel() == 1
            if not fits or not (present is None or scalars or present.shape == loaded.shape):
                here = (
                    f"a quantizer with axis={self._axis}"
                    if present is None
                    else f"shape {tuple(present.shape)} (axis={self._axis})"
                )
                return (
                    f"size mismatch for {key}: the checkpoint has shape {tuple(loaded.shape)}, "
                    f"the model {here}"
                )
        if present is None or present.shape != loaded.shape:
            value = torch.empty(loaded.shape, dtype=torch.float32, device=self.buffer_device)
            if present is not None:
                delattr(self, buffer)
            self.register_buffer(buffer, value)
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle, also one that was saved before some of the fields existed."""
        super().__setstate__(state)
        if "_place" not in self._buffers:
            amax = self._buffers.get("_amax")
            place = torch.empty(0) if amax is None else torch.empty(0, device=amax.device)
            self.register_buffer("_place", place, persistent=False)
        if "_pre_quant_scale" not in self._buffers:
            self.register_buffer("_pre_quant_scale", self._buffers.pop("_pre_scale", None))
        for name in _BUFFERS:
            value = self._buffers.get(name)
            if value is not None:
                self._buffers[name] = value.float()
        self.__dict__.pop("_scale", None)
        self._axis = canonical_axis(self._axis)
        for field, default in _LATER_FIELDS.items():
            self.__dict__.setdefault(field, default)

    def extra_repr(self) -> str:
        """A line such as `8bit fake per-tensor amax=2.6400 calibrator=MaxCalibrator quant`."""
        if self._disabled:
            return "disabled"
        words = ["unsigned"] if self._unsigned else []
        if isinstance(self._num_bits, tuple):
            words.append("E{}M{}".format(*self._num_bits))
        else:
            words.append(f"{self._num_bits}bit")
        words += ["narrow"] * self._narrow_range + ["fake"] * self._fake_quant
        words.append("per-tensor" if self._axis is None else f"axis={self._axis}")
        words += [f"block={self._block_size}"] * (self._block_size is not None)
        uncalibrated = "dynamic" if self._dynamic else "uncalibrated"
        sharded = hasattr(self.learned_range, "device_mesh")
        amax = None if sharded else self.amax
        none = "sharded" if sharded else uncalibrated
        words.append("amax=" + (none if amax is None else _short(amax)))
        words += [f"*{self._scale_amax}"] * (self._scale_amax is not None)
        words += ["learned"] * self._learn_amax
        if getattr(self, "_calibrator", None) is not None:
            words.append(f"calibrator={type(self._calibrator).__name__}")
        words += ["quant"] * self._if_quant + ["clip"] * self._if_clip + ["calib"] * self._if_calib
        return " ".join(words)


def check_amax(amax: Tensor, what: str) -> None:
    """Raise unless every value is finite and >= 0.

    Raises:
        ValueError: naming `what` and the offending value.
    """
    bad = ~torch.isfinite(amax) | (amax < 0)
    if bool(bad.any()):
        raise ValueError(f"{what} must be finite and >= 0, got {float(amax[bad][0]):.6g}")


def _short(amax: Tensor) -> str:
    if amax.is_meta:
        return "meta"
    if amax.numel() == 1:
        return f"{float(amax):.4f}"
    return f"[{float(amax.min()):.4f}, {float(amax.max()):.4f}]({amax.numel()})"
