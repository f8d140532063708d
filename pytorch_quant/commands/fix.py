"""`fix`: repairs of an ONNX file that do not change its outputs."""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import EXIT_CODES, add_command, add_target
from pytorch_quant.commands.lint import has_errors
from pytorch_quant.commands.outcome import Outcome

_CODES = EXIT_CODES.replace("an error was found", "the file was written, with errors left in it")


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "fix",
        _run,
        help="repair a Q/DQ ONNX file without another calibration",
        description="Repair what breaks the rules of a runtime in a Q/DQ ONNX file, whoever made "
        "it, without\nchanging what it computes. What cannot be repaired is listed.",
        example="pytorch-quant fix model.onnx fixed.onnx --target onnxruntime",
        codes=_CODES,
    )
    parser.add_argument("file", metavar="IN", help="the file to read")
    parser.add_argument("output", metavar="OUT", help="the file to write; may be the same")
    add_target(parser, "the runtime")


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.export import fix_onnx

    report = fix_onnx(options.file, options.output, target=options.target)
    return Outcome(str(report), report, int(has_errors(report.findings)))
