"""TensorRT calibration caches: the ranges that TensorRT's own calibration found.

A cache is a text file. The first line is a header such as `TRT-8601-EntropyCalibration2`; every
other line is `tensor name: hex`, where `hex` is the big-endian float32 of the scale in real units
per step of int8, so that `amax = 127 * scale`.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

_INT8_BOUND = 127.0
_HEADER = re.compile(r"TRT-\d+-\w+")
# Written without leading zeros, a small number has fewer than eight digits.
_DIGITS = re.compile(r"[0-9a-fA-F]{1,8}")


def read_calibration_cache(path: str | os.PathLike[str]) -> dict[str, float]:
    """Read a calibration cache of TensorRT.

    Args:
        path: The file. Names in it may hold colons and spaces; empty lines are skipped.

    Returns:
        The amax of each tensor in real units, by tensor name, in the order of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no calibration cache, or a scale in it is negative, NaN or
            infinite, or a tensor stands in it twice. The message names file and line.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    amax_of: dict[str, float] = {}
    for number, raw in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            line = raw.rstrip(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: expected UTF-8 text, got {raw[:80]!r}") from error
        if number == 1:
            if not _HEADER.fullmatch(line.strip()):
                raise ValueError(
                    f"{where}: expected a header such as 'TRT-8601-EntropyCalibration2', got "
                    f"{line[:80]!r}; this is no TensorRT calibration cache"
                )
            continue
        if not line.strip():
            continue
        name, colon, digits = line.rpartition(":")
        digits = digits.strip()
        if not (name.strip() and colon and _DIGITS.fullmatch(digits)):
            raise ValueError(
                f"{where}: expected 'tensor name: hex' with up to 8 hexadecimal digits, got "
                f"{line[:200]!r}"
            )
        if name in amax_of:
            raise ValueError(f"{where}: the tensor {name!r} stands in this file twice")
        (scale,) = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(
                f"{where}: the scale of {name!r} must be finite and >= 0, got {digits} = {scale}"
            )
        amax_of[name] = _INT8_BOUND * scale
    return amax_of


def load_calibration_cache(
    model: nn.Module, amax_by_tensor: Mapping[str, float], tensor_of_quantizer: Mapping[str, str]
) -> None:
    """Set the amax of quantizers of `model`, in place, from a calibration cache.

    Tensor names are those of the network that TensorRT calibrated, so only the user knows which
    quantizer stands where. If an error is raised, no amax has been changed.

    Args:
        model: Holds the quantizers.
        amax_by_tensor: Real units, from `read_calibration_cache`.
        tensor_of_quantizer: The tensor name for each quantizer, by qualified name, such as
            `{"conv1._input_quantizer": "input.1"}`. Quantizers that are left out stay as they are.

    Raises:
        ValueError: a quantizer that the model does not have, or a tensor that the cache does not;
            near names are given.
    """
    quantizers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, "load_calib_amax")
    }
    for quantizer, tensor in tensor_of_quantizer.items():
        if quantizer not in quantizers:
            raise ValueError(
                f"the model has no quantizer named {quantizer!r}{_near(quantizer, quantizers)}"
            )
        if tensor not in amax_by_tensor:
            raise ValueError(
                f"{quantizer}: the cache has no tensor named {tensor!r}"
                f"{_near(tensor, amax_by_tensor)}"
            )
    for quantizer, tensor in tensor_of_quantizer.items():
        quantizers[quantizer].amax = amax_by_tensor[tensor]


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"; near names: {', '.join(map(repr, near))}"
    return f"; its names are: {', '.join(map(repr, list(known)[:5])) or 'none'}"
