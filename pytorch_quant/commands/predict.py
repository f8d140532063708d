"""`predict`: which operators of an ONNX file will run in int8."""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import add_command, add_target
from pytorch_quant.commands.outcome import Outcome


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "predict",
        _run,
        help="which operators of a file will run in int8, and why not the others",
        description="Say which operators of a Q/DQ ONNX file a runtime will run in int8 and which "
        "fall back to\nfloat, by its documented fusion rules. Nothing is built or run.",
        example="pytorch-quant predict model.onnx --target tensorrt",
    )
    parser.add_argument("file", metavar="FILE", help="the ONNX file")
    add_target(parser, "the runtime")


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.analysis.plain_data import plain
    from pytorch_quant.export import predict_int8

    prediction = predict_int8(options.file, options.target)
    data = {"file": options.file, **plain(prediction), "share": prediction.share}
    return Outcome(str(prediction), data)
