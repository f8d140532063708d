"""Whether files can be written, asked before the work is done."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from pytorch_quant.files import written_aside


class _NotYet(Exception):
    """Leaves `written_aside` without a file."""


def check_file(path: str | os.PathLike[str]) -> None:
    """Say before the work what `written_aside` would say after it.

    Raises:
        OSError: it is a folder, or its folder does not exist or cannot be written to.
    """
    with suppress(_NotYet), written_aside(path):
        raise _NotYet


def check_folder(folder: Path) -> None:
    """Make a file there that is gone again.

    Raises:
        OSError: it cannot be written to.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
