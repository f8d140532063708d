"""The options of the calibration methods, checked before any batch runs."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from pytorch_quant.calib.methods import METHODS, WEIGHT_METHODS

_SEARCH = {"start_bin": "an int >= 1", "stride": "an int >= 1"}
# The options of each method, with what they accept.
OPTIONS: dict[str, dict[str, str]] = {
    "max": {},
    "mean_max": {},
    "moving_max": {"momentum": "a number from 0 to 1"},
    "percentile": {"percentile": "a number from 0 to 100"},
    "mse": _SEARCH,
    "entropy": _SEARCH,
    "lp": _SEARCH | {"p": "a finite number above 0"},
    "best": {"sample_batches": "an int >= 1"},
}
# What takes effect while batches run, and is too late for `compute_amax`.
COLLECTING = ("momentum", "sample_batches")


def check_methods(method: Any, weight_method: Any) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: naming the methods that exist.
    """
    for argument, value, known in (
        ("method", method, METHODS),
        ("weight_method", weight_method, WEIGHT_METHODS),
    ):
        if value not in known:
            raise ValueError(f"unknown {argument} {value!r}; use one of {', '.join(known)}")


def check_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Refuse options that the method does not have, and values out of range.

    Returns:
        The options as plain numbers, which NumPy scalars become.

    Raises:
        TypeError: the method has no such option.
        ValueError: a value out of range.
    """
    plain: dict[str, Any] = {}
    for name, value in options.items():
        accepted = OPTIONS[method].get(name)
        if accepted is None:
            known = ", ".join(OPTIONS[method]) or "none"
            raise TypeError(f"method {method!r} has no option {name!r}; its options: {known}")
        number = isinstance(value, Real) and not isinstance(value, bool)
        if name == "percentile":
            right = number and 0 <= value <= 100
        elif name == "momentum":
            right = number and 0 <= value <= 1
        elif name == "p":
            right = number and 0 < value < float("inf")
        else:
            right = number and isinstance(value, Integral) and int(value) >= 1
        if not right:
            raise ValueError(f"{name}={value!r} is out of range; use {accepted}")
        plain[name] = int(value) if isinstance(value, Integral) else float(value)
    return plain
