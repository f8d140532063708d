"""`demo`: handwritten digits, from float to a verified int8 file."""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import add_command
from pytorch_quant.commands.outcome import Outcome


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "demo",
        _run,
        help="handwritten digits, from float to a verified int8 file",
        description="Train a small network on handwritten digits, quantize it, compare "
        "calibration\nmethods, fine-tune at 4 bits, export and run it in ONNX Runtime.",
        example="pytorch-quant demo --quick --output runs/demo",
    )
    parser.add_argument("--quick", action="store_true", help="train less; under 40 s")
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="where files go")


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.demo import run_demo

    result = run_demo(options.output, quick=options.quick)
    return Outcome(str(result), result)
