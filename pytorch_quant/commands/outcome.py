"""What a command returns, how it is written, and how a failure is told."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pytorch_quant.analysis.plain_data import plain

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


def failure(error: BaseException) -> dict[str, Any]:
    """A failure as data."""
    return {"error": {"type": type(error).__name__, "message": one_line(error)}}


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = " ".join(_of_worker(error).split())
    if not text or not isinstance(error, _SPEAK_FOR_THEMSELVES):
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... (all of it with --debug)"
    return text


def _of_worker(error: BaseException) -> str:
    """The message, of an error in a process of a DataLoader without the traceback around it."""
    text = str(error)
    if not text.startswith("Caught ") or "\nOriginal Traceback " not in text:
        return text
    name = re.escape(text.split(maxsplit=2)[1])
    *_, last = re.split(rf"^(?:\w+\.)*{name}: ", text, flags=re.MULTILINE)
    return last
