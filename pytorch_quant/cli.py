"""The command line: `python -m pytorch_quant` and `pytorch-quant`."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
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
    try:
        options = parser.parse_args(arguments)
    finally:
        _show("")  # what --help has written
    if options.json and not options.has_json:
        parser.error(f"{options.command} has no --json: its output is that of the script")
    with _interrupts() as interrupts:
        try:
            # Models and exporters may print; what a machine reads must hold nothing else.
            with _stdout_to_stderr() if options.json else nullcontext():
                outcome = options.run(options)
            if outcome is None:
                return 0
            if interrupts:
                # Something took Ctrl-C for a failure of its own and went on.
                raise KeyboardInterrupt
            _show(_told(options, outcome.data) if options.json else f"{outcome.text}\n")
            return outcome.code
        except KeyboardInterrupt:
            interrupts.append(signal.SIGINT)
        except UsageError as error:
            options.parser.error(str(error))
        except Exception as error:
            # An exporter that Ctrl-C stops half-way may end with an error of its own.
            if not interrupts:
                if options.debug:
                    raise
                print(f"pytorch-quant {options.command}: {one_line(error)}", file=sys.stderr)
                if options.json:
                    _show(_told(options, failure(error)))
                return 1
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that gets an entry at each Ctrl-C, which raises KeyboardInterrupt as before."""
    seen: list[int] = []

    def noticed(number: int, frame: Any) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    main_thread = threading.current_thread() is threading.main_thread()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not (main_thread and usual):
        yield seen
        return
    signal.signal(signal.SIGINT, noticed)
    try:
        yield seen
    finally:
        if signal.getsignal(signal.SIGINT) is noticed:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What is printed goes to stderr, also by C++ and by other processes."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _told(options: argparse.Namespace, data: Any) -> str:
    return f"{as_json(options.command, data)}\n"


def _show(text: str) -> None:
    if text and isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows ASCII alone shows the rest as escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python would write the rest once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader such as `head` has seen enough when it closes the pipe.
        if not isinstance(error, BrokenPipeError):
            raise


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
