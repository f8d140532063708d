"""Results as plain data: dicts, lists, numbers and texts that `json` writes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pytorch_quant.scheme import Scheme


def plain(value: Any) -> Any:
    """`value` with dataclasses as dicts, schemes as their names, tuples and tensors as lists.

    Infinity and NaN, which JSON does not have, become None; so does what is private or callable.
    """
    if isinstance(value, Scheme):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if not f.name.startswith("_")]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Result:
    """Mixin of what an analysis returns."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data; infinity and NaN are None."""
        return plain(self)

    def to_json(self) -> str:
        """`as_dict()` as JSON."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)


def shown_db(value: float | None) -> str:
    """A ratio in dB for a table; `-` where nothing was seen, `exact` without any error."""
    if value is None or math.isnan(value):
        return "-"
    # Not -0.0.
    return "exact" if value == math.inf else f"{round(value, 1) + 0.0:.1f}"


def with_unit(value: float) -> str:
    """A ratio for a sentence: `39.4 dB`, `exact`."""
    shown = shown_db(value)
    return f"{shown} dB" if math.isfinite(value) else shown
