"""`verify`: does an ONNX file compute what the quantized model computes?"""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import (
    EXIT_CODES,
    add_command,
    add_data,
    add_network,
    add_quiet,
)
from pytorch_quant.commands.outcome import Outcome, UsageError

_CODES = EXIT_CODES.replace("an error was found", "the file is not what the model computes")


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "verify",
        _run,
        help="does an ONNX file compute what the quantized model computes",
        description="Compare an exported file with the quantized model that it came from, layer by "
        "layer and\nfrom end to end, in ONNX Runtime, OpenVINO and TensorRT where they are "
        "installed, and in\nonnx.reference. On a mismatch the first tensor that diverges is named.",
        example="pytorch-quant verify runs/resnet18/quantized.onnx resnet18 \\\n"
        "    --checkpoint runs/resnet18/quantized.pt --data images/",
        codes=_CODES,
    )
    parser.add_argument("file", metavar="FILE", help="the ONNX file")
    add_network(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="quantized.pt of `quantize`, or a state_dict where MODEL returns a quantized model",
    )
    add_data(
        parser,
        required=False,
        samples=8,
        group_help="inputs; random ones by default, but real ones say more",
    )
    parser.add_argument(
        "--engine",
        action="append",
        choices=("onnxruntime", "openvino", "reference", "tensorrt"),
        help="where to run it from end to end; may be repeated; default wherever it can",
    )
    parser.add_argument(
        "--min-sqnr", type=float, default=20.0, help="dB; outputs below it are wrong; default 20"
    )
    add_quiet(parser)


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.commands.networks import load_network
    from pytorch_quant.commands.preparation import as_arguments, example_of, restore, some
    from pytorch_quant.commands.quantize_report import verify_data
    from pytorch_quant.commands.samples import check_fit, open_data
    from pytorch_quant.export import verify_onnx
    from pytorch_quant.export.ports import ports, read_onnx

    if options.checkpoint is not None and options.weights is not None:
        raise UsageError("--checkpoint holds the weights; leave out --weights")
    if options.checkpoint is None and options.data is None:
        raise UsageError(
            "only a --checkpoint of `quantize` knows what inputs look like; add --data"
        )
    given, _ = ports(read_onnx(options.file, data=False))
    shape = given[0].shape if given else None
    batch = (shape[0] if shape else None) or 2
    arguments = dict(options.model_arg)
    network = load_network(
        options.model, arguments, options.weights, options.device, any_weights=True
    )
    model = network.model
    placement = None
    if options.checkpoint is not None:
        placement = restore(model, options.checkpoint)
    if options.data is not None:
        batches = open_data(options, model, network.transform)
        check_fit(model, batches, options.data)
        inputs = some(batches.example(), batch)
    elif placement is not None:
        inputs = example_of(placement, batch=batch)
    else:
        raise UsageError(
            "only a --checkpoint of `quantize` knows what inputs look like; add --data"
        )
    model.cpu()
    report = verify_onnx(
        options.file,
        model,
        as_arguments(inputs),
        engines=options.engine,
        min_sqnr=options.min_sqnr,
        progress=not options.quiet,
    )
    return Outcome(str(report), verify_data(report), int(not report.ok))
