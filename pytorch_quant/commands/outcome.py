"""What a command returns, how it is written, and how a failure is told."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pytorch_quant.scheme import Scheme

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells give it."""

_LONGEST = 600
# Their texts say what happened; those of others need the name of the error.
_SPEAK_FOR_THEMSELVES = (ValueError, RuntimeError, TypeError, OSError, ImportError)


class UsageError(Exception):
    """Options that do not fit together; ends with exit code 2."""


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        text: For people.
        data: For machines: a mapping or a dataclass, of anything that `plain` takes.
        code: The exit code.
    """

    text: str
    data: Any
    code: int = 0


def as_json(command: str, data: Any) -> str:
    """`data` as one JSON object, with the name of the command in front."""
    return json.dumps({"command": command, **plain(data)}, indent=2, allow_nan=False)


def plain(value: Any) -> Any:
    """What `json` writes; infinity and NaN, which JSON does not have, become None."""
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


def failure(error: BaseException) -> dict[str, Any]:
    """A failure as data."""
    return {"error": {"type": type(error).__name__, "message": one_line(error)}}


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = " ".join(str(error).split())
    if not text or not isinstance(error, _SPEAK_FOR_THEMSELVES):
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... (all of it with --debug)"
    return text
