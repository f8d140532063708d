"""`run-compat`: an unmodified script that imports pytorch_quantization."""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import add_command

_CODES = """exit codes:
  those of the script; 1 after an exception or where it cannot be read, 2 wrong usage, 130 Ctrl-C"""


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "run-compat",
        _run,
        help="an unmodified script that imports pytorch_quantization",
        description="Run a script as python would, with `import pytorch_quantization` resolving "
        "to this\npackage. The exit code is the script's.",
        example="pytorch-quant run-compat train.py --epochs 10",
        codes=_CODES,
        has_json=False,
    )
    parser.add_argument(
        "--trust-pickles",
        action="store_true",
        help="let the script's torch.load run the code in pickled models (weights_only=False)",
    )
    parser.add_argument("script", help="path of the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")


def _run(options: argparse.Namespace) -> None:
    from pytorch_quant.compat.run_script import run_script

    code = run_script(options.script, options.arguments, trust_pickles=options.trust_pickles)
    if code:
        raise SystemExit(code)
