"""The command line: `python -m pytorch_quant` and `pytorch-quant`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

from pytorch_quant._version import __version__
from pytorch_quant.commands import COMMANDS
from pytorch_quant.commands.arguments import EXIT_CODES
from pytorch_quant.commands.outcome import (
    INTERRUPTED,
    UsageError,
    as_json,
    failure,
    one_line,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Results go to stdout; progress, warnings and the line that says what went wrong to stderr. With
    `--json` stdout holds one JSON object and nothing else, also after a failure.

    Args:
        arguments: Words of the command line; by default those of the process.

    Returns:
        0 on success, 1 on a failure (one line on stderr) or where a check fails, 130 on Ctrl-C.

    Raises:
        SystemExit: with 2 on wrong usage, with 0 after `--help` and `--version`; or a script under
            `run-compat` exits.
        Exception: of any kind, with `--debug`.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and not options.has_json:
        parser.error(f"{options.command} has no --json: its output is that of the script")
    try:
        # Models and exporters may print; what a machine reads must hold nothing else.
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            outcome = options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except UsageError as error:
        options.parser.error(str(error))
    except Exception as error:
        if options.debug:
            raise
        print(f"pytorch-quant {options.command}: {one_line(error)}", file=sys.stderr)
        if options.json:
            _show(as_json(options.command, failure(error)))
        return 1
    if outcome is None:
        return 0
    _show(as_json(options.command, outcome.data) if options.json else outcome.text)
    return outcome.code


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pytorch-quant",
        description="TensorRT-style quantization for PyTorch. "
        "`pytorch-quant COMMAND --help` has the options of a command, with an example.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        importlib.import_module(f"pytorch_quant.commands.{name}").add(commands)
    return parser
