"""`lint`: the rules of a runtime on an ONNX file."""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import EXIT_CODES, add_command, add_target
from pytorch_quant.commands.outcome import Outcome

_CODES = EXIT_CODES.replace("an error was found", "a finding of severity error")


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "lint",
        _run,
        help="check a Q/DQ ONNX file against the rules of a runtime",
        description="Check a Q/DQ ONNX file, whoever made it, against the rules of a runtime. Each "
        "finding\nhas the id of its rule, a severity (error, warning, performance), the node, and "
        "what to do.",
        example="pytorch-quant lint model.onnx --target onnxruntime",
        codes=_CODES,
    )
    parser.add_argument("file", metavar="FILE", help="the ONNX file")
    add_target(parser, "the runtime")


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.export.lint import lint_onnx

    findings = lint_onnx(options.file, options.target)
    data = {
        "file": options.file,
        "target": options.target,
        "counts": counts(findings),
        "findings": findings,
    }
    lines = [*map(str, findings), f"{options.file}, for {options.target}: {told(findings)}"]
    return Outcome("\n".join(lines), data, int(has_errors(findings)))


def counts(findings: list[Any]) -> dict[str, int]:
    """How many findings there are of each severity."""
    from pytorch_quant.export.lint.finding import SEVERITIES

    return {s: sum(finding.severity == s for finding in findings) for s in SEVERITIES}


def told(findings: list[Any]) -> str:
    """The counts in words."""
    found = ", ".join(
        f"{count} {severity}" for severity, count in counts(findings).items() if count
    )
    return found or "no findings"


def has_errors(findings: list[Any]) -> bool:
    """Whether one has the severity error."""
    return any(finding.severity == "error" for finding in findings)
