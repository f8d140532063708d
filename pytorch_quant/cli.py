"""The command line: `python -m pytorch_quant` and `pytorch-quant`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pytorch_quant._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line; by default those of the process.

    Returns:
        0 on success, 1 on a failure (one line on stderr), 2 on wrong usage, 130 on Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"pytorch-quant {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pytorch-quant",
        description="TensorRT-style quantization for PyTorch.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="handwritten digits, from float to a verified int8 file",
        description="Train a small network on handwritten digits, quantize it, compare "
        "calibration methods, fine-tune at 4 bits, export and run it in ONNX Runtime.",
        epilog="example: python -m pytorch_quant demo --quick --output runs/demo",
    )
    demo.add_argument("--quick", action="store_true", help="train less; under 40 s")
    demo.add_argument("--output", default="runs/demo", metavar="DIR", help="where files go")
    demo.set_defaults(run=_demo)
    compat = commands.add_parser(
        "run-compat",
        help="an unmodified script that imports pytorch_quantization",
        description="Run a script as python would, with `import pytorch_quantization` resolving "
        "to this package. The exit code is the script's.",
        epilog="example: python -m pytorch_quant run-compat train.py --epochs 10",
    )
    compat.add_argument(
        "--trust-pickles",
        action="store_true",
        help="let the script's torch.load run the code in pickled models (weights_only=False)",
    )
    compat.add_argument("script", help="path of the script")
    compat.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    compat.set_defaults(run=_run_compat)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from pytorch_quant.demo import run_demo

    print(run_demo(options.output, quick=options.quick))


def _run_compat(options: argparse.Namespace) -> None:
    from pytorch_quant.compat.run_script import run_script

    code = run_script(options.script, options.arguments, trust_pickles=options.trust_pickles)
    if code:
        raise SystemExit(code)
