"""The command line and the output that benchmarks of quantization-aware training share."""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from timing import Row, machine, report, status

from pytorch_quant.files import written_aside

# malloc.h of the GNU C library.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST, _SMALL = 2**31 - 1, 2**16


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add `--quick`, `--device` and `--json`."""
    add = parser.add_argument
    add("--quick", action="store_true", help="small tensors and few rounds")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--json", type=Path, metavar="FILE", help="write the rows as JSON too")


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the common options, `--rounds`, `--compile` and `--return-memory`."""
    add_common_options(parser)
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help=f"rounds of each timing (default: {rounds})")
    add("--compile", action="store_true", help="measure compiled code as well")
    add(
        "--return-memory",
        action="store_true",
        help="let the C library return freed memory to the system, as it does by itself",
    )


def checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; an argument that cannot be is an error of the parser."""
    args = parser.parse_args(argv)
    for name in ("rounds", "batch_size"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --device cpu")
    if not hasattr(args, "rounds"):
        return args
    if args.quick:
        args.rounds = min(args.rounds, 2)
    if not args.return_memory:
        keep_freed_memory()
    return args


def keep_freed_memory() -> None:
    """Have the process use its memory again, where the C library is GNU's.

    By itself it returns large blocks to the system at moments that depend on what was allocated
    before, and takes them back page by page. That can take longer than what is measured.
    """
    _set_thresholds(_MOST)


def return_freed_memory() -> None:
    """Have the process return large blocks when they are freed, where the C library is GNU's.

    Its resident memory is then what it uses, and does not depend on gaps between blocks.
    """
    _set_thresholds(_SMALL)


def _set_thresholds(size: int) -> None:
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, size)


def finish(title: str, rows: Sequence[Row], args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Print the table, write the JSON, and return the exit status."""
    command = shlex.join(["python", f"tools/bench/{Path(sys.argv[0]).name}", *argv])
    print(report(title, rows, command, args.device))
    if args.json is not None:
        content = {
            "title": title,
            "machine": machine(args.device),
            "command": command,
            "rows": [row._asdict() for row in rows],
        }
        with written_aside(args.json) as path:
            Path(path).write_text(json.dumps(content, indent=2) + "\n")
    return status(rows)
