"""`summary`: the layers and quantizers of a model."""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import add_checkpoint, add_command, add_network
from pytorch_quant.commands.outcome import Outcome, UsageError


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "summary",
        _run,
        help="layers, quantizers, formats and ranges of a model",
        description="List the layers and quantizers of a model with their formats, ranges and "
        "states.",
        example="pytorch-quant summary resnet18 --checkpoint runs/resnet18/quantized.pt",
    )
    add_network(parser)
    add_checkpoint(parser)


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.analysis import summary
    from pytorch_quant.commands.networks import load_network
    from pytorch_quant.commands.preparation import restore

    if options.checkpoint is not None and options.weights is not None:
        raise UsageError("--checkpoint holds the weights; leave out --weights")
    arguments = dict(options.model_arg)
    network = load_network(
        options.model, arguments, options.weights, options.device, any_weights=True
    )
    if options.checkpoint is not None:
        restore(network.model, options.checkpoint)
    found = summary(network.model)
    return Outcome(str(found), found)
