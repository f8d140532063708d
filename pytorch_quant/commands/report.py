"""`report`: a page about what quantization did."""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import add_command, add_quiet, add_ready
from pytorch_quant.commands.outcome import Outcome


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "report",
        _run,
        help="one HTML page about what quantization did to a model",
        description="Write one HTML page: the error of each layer and tensor, histograms with the "
        "range of each\nmethod, the placement, which operators run in int8, lint findings, and "
        "layers ranked by harm.\nThe model is quantized and calibrated on the same data first, or "
        "comes from a checkpoint.",
        example="pytorch-quant report resnet18 --checkpoint runs/resnet18/quantized.pt \\\n"
        "    --data images/ --accuracy --latency --output report.html",
    )
    add_ready(parser, group_help="labelled, for --accuracy", target="the runtime")
    group = parser.add_argument_group("page")
    group.add_argument(
        "--output", default="report.html", metavar="FILE", help="default report.html"
    )
    group.add_argument("--accuracy", action="store_true", help="top-1 of float and quantized")
    group.add_argument(
        "--latency", action="store_true", help="time an int8 file beside a float one"
    )
    group.add_argument(
        "--pictures", action="store_true", help="write PNG files beside the page too"
    )
    add_quiet(parser)


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.commands.preparation import ready
    from pytorch_quant.commands.rule_files import resolved
    from pytorch_quant.commands.samples import forward, top1
    from pytorch_quant.commands.writable import check_file
    from pytorch_quant.html_report import report
    from pytorch_quant.optional import require

    check_file(options.output)
    if options.pictures:
        require("matplotlib")
    prepared = ready(options, keep_float=True, labelled=options.accuracy)
    before = prepared.float_model

    def evaluate(model: Any) -> float:
        return top1(model, prepared.batches, name="top-1", progress=not options.quiet)

    written = report(
        prepared.model,
        prepared.batches,
        options.output,
        float_model=before,
        rules=None if before is None else resolved(prepared.rules, before),
        evaluate=evaluate if options.accuracy else None,
        latency=options.latency,
        target=prepared.target,
        pictures=options.pictures,
        forward=forward,
        progress=not options.quiet,
    )
    return Outcome(str(written), written)
