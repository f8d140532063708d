"""Logging under the names that existing programs import, without absl.

Messages go to the logger `pytorch_quant` of the standard library. No handler is added: what is
shown, and where, is the program's choice (`logging.basicConfig()`).
"""

from __future__ import annotations

import logging
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, WARNING

__all__ = [
    "CRITICAL",
    "DEBUG",
    "ERROR",
    "FATAL",
    "INFO",
    "WARNING",
    "critical",
    "debug",
    "error",
    "exception",
    "fatal",
    "get_verbosity",
    "info",
    "log",
    "set_verbosity",
    "warn",
    "warning",
]

_logger = logging.getLogger("pytorch_quant")
# The numbers that absl gives the levels.
_ABSL_LEVELS = {-3: FATAL, -2: ERROR, -1: WARNING, 0: INFO, 1: DEBUG}

log = _logger.log
debug = _logger.debug
info = _logger.info
warning = warn = _logger.warning
error = _logger.error
exception = _logger.exception
critical = fatal = _logger.critical


def set_verbosity(level: int | str) -> None:
    """Set the least level of the messages that pass.

    Args:
        level: A level of `logging`, its name in any case, or the number of absl (-3 to 1).

    Raises:
        TypeError: `level` is neither an int nor a string.
        ValueError: no level has that name.
    """
    if isinstance(level, str):
        level = level.upper()
    _logger.setLevel(_ABSL_LEVELS.get(level, level) if isinstance(level, int) else level)


def get_verbosity() -> int:
    """The least level of the messages that pass, as a number of `logging`."""
    return _logger.getEffectiveLevel()
