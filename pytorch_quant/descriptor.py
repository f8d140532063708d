"""`QuantDescriptor`: how one tensor is quantized, as a frozen value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import yaml

from pytorch_quant.axes import Axis, canonical_axis, fits_axis
from pytorch_quant.formats import Format, make_format

CALIB_METHODS = ("max", "histogram")

_DEFAULTS: dict[str, Any] = {
    "num_bits": 8,
    "name": None,
    "fake_quant": True,
    "axis": None,
    "amax": None,
    "learn_amax": False,
    "scale_amax": None,
    "calib_method": "max",
    "unsigned": False,
    "narrow_range": False,
    "block_size": None,
    "dynamic": False,
}


class QuantDescriptor:
    """How one tensor is quantized. Frozen, hashable, checked at construction.

    Args:
        num_bits: Integer width 2 to 16, or `(4, 3)` (E4M3) or `(2, 1)` (E2M1).
        name: A name for messages.
        fake_quant: Return fake-quantized values; if false, integer codes.
        axis: The axis that is kept, or a tuple of them; None is per tensor.
        amax: A fixed amax, real units: a number, or an array for a per-channel quantizer.
        learn_amax: Train the range of a per-tensor quantizer through a clip.
        scale_amax: A factor on amax.
        calib_method: `"max"` or `"histogram"`: which calibrator the quantizer starts with.
        unsigned: Codes from 0 up, for tensors without negative values.
        narrow_range: Drop the lowest signed code.
        block_size: Elements along `axis` that share one amax; all other axes are kept.
        dynamic: Ranged at run time by design, as ONNX DynamicQuantizeLinear does.

    Raises:
        TypeError: a field of the wrong type, or one that does not exist (`Unused keys`).
        ValueError: a field out of range, or fields that contradict each other.
    """

    num_bits: int | tuple[int, int]
    name: str | None
    fake_quant: bool
    axis: Axis
    amax: np.ndarray | None
    learn_amax: bool
    scale_amax: float | None
    calib_method: str
    unsigned: bool
    narrow_range: bool
    block_size: int | None
    dynamic: bool

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        name: str | None = None,
        *,
        fake_quant: bool = True,
        axis: int | Iterable[int] | None = None,
        amax: float | list | np.ndarray | None = None,
        learn_amax: bool = False,
        scale_amax: float | None = None,
        calib_method: str = "max",
        unsigned: bool = False,
        narrow_range: bool = False,
        block_size: int | None = None,
        dynamic: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(_unused_keys(unknown))
        make_format(num_bits, unsigned, narrow_range)
        flags = {
            "fake_quant": fake_quant,
            "learn_amax": learn_amax,
            "unsigned": unsigned,
            "narrow_range": narrow_range,
            "dynamic": dynamic,
        }
        for key, flag in flags.items():
            if not isinstance(flag, (bool, np.bool_)):
                raise TypeError(f"{key} must be True or False, got {flag!r}")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}")
        fields: dict[str, Any] = {
            "num_bits": tuple(num_bits) if isinstance(num_bits, (tuple, list)) else int(num_bits),
            "name": name,
            "axis": canonical_axis(axis),
            "scale_amax": _checked_scale_amax(scale_amax),
            "calib_method": _checked_calib_method(calib_method),
            "block_size": _checked_block_size(block_size),
            **{key: bool(flag) for key, flag in flags.items()},
        }
        fields["amax"] = _checked_amax(amax)
        _check_combination(fields)
        self.__dict__.update(fields)

    @property
    def format(self) -> Format:
        """The number format that the fields describe."""
        return make_format(self.num_bits, self.unsigned, self.narrow_range)

    def replace(self, **changes: Any) -> QuantDescriptor:
        """A copy with some fields changed."""
        return QuantDescriptor(**{**self.__dict__, **changes})

    def dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain Python values.

        `QuantDescriptor(**d.dict())` equals `d`.
        """
        values = {**self.__dict__, "amax": None if self.amax is None else self.amax.tolist()}
        return {k: values[k] for k, default in _DEFAULTS.items() if values[k] != default}

    def to_yaml(self) -> str:
        """The descriptor as YAML; `from_yaml` gives an equal one back."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in self.dict().items()}
        return yaml.safe_dump(plain, sort_keys=True)

    @classmethod
    def from_yaml(cls, text: str) -> QuantDescriptor:
        """Read a descriptor written by `to_yaml`.

        Raises:
            TypeError: the text is no mapping, or it names a field that does not exist.
        """
        fields = yaml.safe_load(text) or {}
        if not isinstance(fields, dict):
            raise TypeError(f"a descriptor in YAML is a mapping of its fields, got {fields!r}")
        return cls(**fields)

    def __getattr__(self, name: str) -> Any:
        # The fields under the private names that they had in pytorch_quantization.
        field = name.removeprefix("_")
        if name != field and field in self.__dict__:
            return self.__dict__[field]
        fields = ", ".join(_DEFAULTS)
        raise AttributeError(f"a QuantDescriptor has no field {name!r}; it has {fields}")

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(
            f"a QuantDescriptor is frozen; use descriptor.replace({key}=...) for a changed copy"
        )

    def __delattr__(self, key: str) -> None:
        raise AttributeError("a QuantDescriptor is frozen; its fields cannot be deleted")

    def _key(self) -> tuple[Any, ...]:
        amax = None if self.amax is None else (self.amax.shape, self.amax.tobytes())
        return (amax, *(getattr(self, k) for k in _DEFAULTS if k != "amax"))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantDescriptor):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.dict(),)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore a pickle of pytorch_quantization, whose fields begin with an underscore."""
        fields = {key.removeprefix("_"): value for key, value in state.items()}
        known = {key: value for key, value in fields.items() if key in _DEFAULTS}
        self.__dict__.update(QuantDescriptor(**known).__dict__)

    def __repr__(self) -> str:
        return f"QuantDescriptor({', '.join(f'{k}={v!r}' for k, v in self.dict().items())})"


def _rebuild(fields: dict[str, Any]) -> QuantDescriptor:
    return QuantDescriptor(**fields)


def _unused_keys(unknown: dict[str, Any]) -> str:
    hints = []
    for key in unknown:
        near = difflib.get_close_matches(key, _DEFAULTS, n=1)
        hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return f"Unused keys: {', '.join(hints)}; a QuantDescriptor takes {', '.join(_DEFAULTS)}"


def _checked_amax(amax: Any) -> np.ndarray | None:
    if amax is None:
        return None
    if isinstance(amax, (bool, str)) or not isinstance(
        amax, (int, float, list, tuple, np.ndarray, np.number)
    ):
        raise TypeError(f"amax must be float, list or ndarray, got {type(amax).__name__}")
    try:
        value = np.array(amax, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"amax must be float, list or ndarray of numbers, got {amax!r}") from error
    if not np.all(np.isfinite(value)) or np.any(value < 0):
        raise ValueError(f"amax must be finite and >= 0, got {amax!r}")
    value.setflags(write=False)
    return value


def _checked_scale_amax(scale_amax: Any) -> float | None:
    if scale_amax is None:
        return None
    if isinstance(scale_amax, bool) or not isinstance(scale_amax, (int, float, np.number)):
        raise TypeError(f"scale_amax must be a number, got {scale_amax!r}")
    if not (math.isfinite(scale_amax) and scale_amax > 0):
        raise ValueError(f"scale_amax must be finite and > 0, got {scale_amax!r}")
    return float(scale_amax)


def _checked_calib_method(method: Any) -> str:
    if method not in CALIB_METHODS:
        raise ValueError(
            f"unknown calib_method {method!r}; use one of {', '.join(map(repr, CALIB_METHODS))} "
            "(percentile, mse and entropy are asked of compute_amax, on a histogram)"
        )
    return method


def _checked_block_size(block_size: Any) -> int | None:
    if block_size is None:
        return None
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be an int, got {block_size!r}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    return block_size


def _check_combination(fields: dict[str, Any]) -> None:
    axis, amax = fields["axis"], fields["amax"]
    if fields["learn_amax"] and axis is not None:
        raise TypeError(
            f"with learn_amax=True axis is ignored and must be None, got axis={axis!r}; "
            "a learned range is per tensor"
        )
    if axis is None and amax is not None and amax.size != 1:
        raise ValueError(
            f"amax has {amax.size} values but axis is None (per tensor); name the kept axis, or "
            "give one value"
        )
    if fields["block_size"] is None and amax is not None and not fits_axis(amax.shape, axis):
        raise ValueError(
            f"an amax of shape {amax.shape} does not fit axis={axis!r}; give a list with one value "
            "for each entry of the kept axis"
        )
    if fields["block_size"] is not None and not isinstance(axis, int):
        raise ValueError(
            f"block_size={fields['block_size']} needs axis= the one axis that is cut into blocks, "
            f"got axis={axis!r}"
        )
    if fields["dynamic"]:
        clash = {
            "num_bits": fields["num_bits"] != 8,
            "axis": axis is not None,
            "amax": amax is not None,
            "learn_amax": fields["learn_amax"],
            "unsigned": fields["unsigned"],
            "narrow_range": fields["narrow_range"],
            "scale_amax": fields["scale_amax"] is not None,
        }
        wrong = [key for key, clashes in clash.items() if clashes]
        if wrong:
            raise ValueError(
                f"dynamic=True ranges 8-bit per-tensor codes at run time; leave out "
                f"{', '.join(wrong)}"
            )
