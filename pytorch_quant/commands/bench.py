"""`bench`: the latency of files side by side."""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import (
    add_command,
    add_quiet,
    named_shape,
    not_negative,
    positive,
)
from pytorch_quant.commands.outcome import Outcome

_ENGINES = ("onnxruntime", "openvino", "tensorrt")


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "bench",
        _run,
        help="latency of ONNX files side by side",
        description="Time ONNX files in turns, so that whatever else the machine does hits all of "
        "them, and\nshow medians and quartiles.",
        example="pytorch-quant bench model_fp32.onnx model_int8.onnx --engine openvino --threads 4",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="the first is the reference")
    parser.add_argument("--engine", choices=_ENGINES, default=_ENGINES[0], help="where they run")
    parser.add_argument("--threads", type=positive, help="default: as many as torch uses")
    parser.add_argument(
        "--rounds", type=positive, default=50, help="timed runs of each; default 50"
    )
    parser.add_argument(
        "--warmup", type=not_negative, default=5, help="runs before them; default 5"
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        type=named_shape,
        metavar="NAME=1,3,224,224",
        help="shape of an input; varying dimensions are 1 by default. May be repeated",
    )
    add_quiet(parser)


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.export import compare_latency

    report = compare_latency(
        options.files,
        engine=options.engine,
        threads=options.threads,
        rounds=options.rounds,
        warmup=options.warmup,
        shapes=dict(options.shape),
        progress=not options.quiet,
    )
    return Outcome(str(report), report)
