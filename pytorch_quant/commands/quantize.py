"""`quantize`: from a float model and data to a quantized checkpoint, an ONNX file and a report."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_quant.commands.arguments import (
    EXIT_CODES,
    add_calibration,
    add_command,
    add_data,
    add_network,
    add_quiet,
    add_target,
    positive,
)
from pytorch_quant.commands.outcome import Outcome

if TYPE_CHECKING:
    from torch import nn

    from pytorch_quant.commands.samples import Batches

_CODES = EXIT_CODES.replace(
    "of a check: an error was found", "the files were written, and --verify or lint found an error"
)
# More samples than any data set has.
_ALL = 2**62
# What the HTML page looks at.
_PAGE_SAMPLES = 64
_EXAMPLE = """pytorch-quant quantize resnet18 --weights DEFAULT --data images/ \\
    --method percentile --method-option percentile=99.99 --target onnxruntime \\
    --verify --output runs/resnet18
pytorch-quant quantize net.py:build --weights net.pt --data calibration.npz --rules rules.yaml"""


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "quantize",
        _run,
        help="a model and data to a quantized checkpoint, an ONNX file and a report",
        description="Place quantizers where a runtime wants them, calibrate, export. Writes to the "
        "output folder:\nquantized.pt (for --checkpoint of other commands), quantized.onnx, "
        "report.txt and report.json;\nwith --float also float.onnx, with --html report.html.",
        example=_EXAMPLE,
        codes=_CODES,
    )
    add_network(parser)
    add_data(
        parser,
        required=True,
        samples=256,
        group_help="what ranges are calibrated on, a few hundred",
    )
    add_calibration(parser)
    group = parser.add_argument_group("accuracy")
    group.add_argument("--evaluate", metavar="PATH", help="labelled data: top-1 before and after")
    group.add_argument(
        "--evaluate-samples", type=positive, metavar="N", help="how many of it; default all"
    )
    group = parser.add_argument_group("files")
    add_target(group, "the runtime that the file is for")
    group.add_argument(
        "--output", default="runs/quantize", metavar="DIR", help="default runs/quantize"
    )
    group.add_argument(
        "--opset", type=positive, metavar="N", help="of the ONNX file; default what it needs"
    )
    group.add_argument(
        "--stored-weights",
        choices=("int8", "float"),
        default="int8",
        help="float keeps Q and DQ behind float weights, for TensorRT 8; default int8",
    )
    group.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="batch size of the file; default 1"
    )
    group.add_argument("--dynamic-batch", action="store_true", help="the batch size varies")
    group.add_argument("--float", action="store_true", help="write float.onnx, for bench")
    group.add_argument(
        "--html", action="store_true", help="write report.html, a page with pictures"
    )
    group.add_argument(
        "--verify", action="store_true", help="run the file beside the model; needs ONNX Runtime"
    )
    add_quiet(parser)


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.commands.networks import load_network
    from pytorch_quant.commands.preparation import check_method
    from pytorch_quant.commands.rule_files import read_rules
    from pytorch_quant.commands.samples import check_fit, check_labelled, open_data
    from pytorch_quant.commands.writable import check_folder
    from pytorch_quant.optional import require

    check_method(options)
    if options.verify:
        # Before the calibration, as it comes last.
        require("onnxruntime")
    rules = {} if options.rules is None else read_rules(options.rules)
    network = load_network(options.model, dict(options.model_arg), options.weights, options.device)
    model = network.model
    batches = open_data(options, model, network.transform)
    labelled = None
    if options.evaluate is not None:
        path, count = options.evaluate, options.evaluate_samples
        labelled = open_data(options, model, network.transform, path=path, count=count or _ALL)
        check_labelled(labelled)
        check_fit(model, labelled, path)
    check_fit(model, batches, options.data)
    folder = Path(options.output)
    with _made(folder):
        check_folder(folder)
        return _quantized(options, rules, model, batches, labelled, folder)


def _quantized(
    options: argparse.Namespace,
    rules: dict[str, str | None],
    model: nn.Module,
    batches: Batches,
    labelled: Batches | None,
    folder: Path,
) -> Outcome:
    from pytorch_quant.commands.checkpoints import write_checkpoint
    from pytorch_quant.commands.preparation import calibrated, fold, place, some
    from pytorch_quant.commands.quantize_report import QuantizeReport, write_reports
    from pytorch_quant.commands.samples import top1
    from pytorch_quant.nn.modes import named_quantizers

    files = {"checkpoint": folder / "quantized.pt", "onnx": folder / "quantized.onnx"}
    accuracy: dict[str, float] = {}

    def evaluate(name: str) -> None:
        if labelled is not None:
            accuracy[name] = top1(model, labelled, name=name, progress=not options.quiet)

    evaluate("float")
    example = batches.example()
    inputs = some(example, max(2, options.batch) if options.dynamic_batch else options.batch)
    if options.float:
        files["float_onnx"] = folder / "float.onnx"
        _export(options, model, inputs, files["float_onnx"])
    keep = options.keep_batchnorm
    fold(model, example, keep_batchnorm=keep)
    before = copy.deepcopy(model) if options.html and not named_quantizers(model) else None
    placement, left = place(model, rules, options.target, example, keep_batchnorm=keep)
    calibration = calibrated(options, model, batches)
    evaluate("quantized")
    exported = _export(options, model, inputs, files["onnx"])
    write_checkpoint(files["checkpoint"], model, placement)
    report = QuantizeReport(
        settings=_settings(options, rules, batches.count),
        files=files,
        accuracy=accuracy,
        left=left,
        calibration=calibration,
        exported=exported,
        **_checks(options, model, inputs, files["onnx"]),
    )
    if options.html:
        files["html"] = folder / "report.html"
        _write_html(options, model, before, rules, batches, accuracy, files["html"])
    write_reports(report, folder)
    return Outcome(report.short(), report.as_dict(), int(not report.ok))


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that is gone again where nothing was written into it."""
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not there and not any(folder.iterdir()):
            folder.rmdir()


def _settings(options: argparse.Namespace, rules: Any, samples: int) -> dict[str, Any]:
    return {
        "model": options.model,
        "model_arguments": dict(options.model_arg),
        "weights": options.weights,
        "data": options.data,
        "samples": samples,
        "method": options.method,
        "method_options": dict(options.method_option),
        "weight_method": options.weight_method,
        "rules": rules,
        "target": options.target,
    }


def _write_html(
    options: argparse.Namespace,
    model: nn.Module,
    before: nn.Module | None,
    rules: dict[str, str | None],
    batches: Batches,
    accuracy: dict[str, float],
    path: Path,
) -> None:
    from itertools import islice

    from pytorch_quant.commands.rule_files import resolved
    from pytorch_quant.commands.samples import forward
    from pytorch_quant.html_report import report

    report(
        model,
        # They run twice for each layer.
        list(islice(batches, -(-_PAGE_SAMPLES // options.batch_size))),
        path,
        float_model=before,
        rules=None if before is None else resolved(rules, before),
        accuracy=accuracy or None,
        target=options.target,
        forward=forward,
        progress=not options.quiet,
    )


def _export(options: argparse.Namespace, model: Any, inputs: Any, path: Path) -> Any:
    from pytorch_quant.commands.preparation import as_arguments
    from pytorch_quant.export import export_onnx

    shapes: Any = None
    if options.dynamic_batch:
        varies = {0: "batch"}
        shapes = dict.fromkeys(inputs, varies) if isinstance(inputs, dict) else (varies,)
    model.cpu()
    try:
        return export_onnx(
            model,
            as_arguments(inputs),
            path,
            target=options.target,
            opset=options.opset,
            weights=options.stored_weights,
            dynamic_shapes=shapes,
        )
    finally:
        model.to(options.device)


def _checks(options: argparse.Namespace, model: Any, inputs: Any, path: Path) -> dict[str, Any]:
    from pytorch_quant.commands.preparation import as_arguments
    from pytorch_quant.export import predict_int8, verify_onnx
    from pytorch_quant.export.engines import installed
    from pytorch_quant.export.lint import lint_onnx

    verified = None
    if options.verify:
        # What the file is meant for; other runtimes may have faults of their own.
        engines = dict.fromkeys(e for e in ("onnxruntime", options.target) if installed(e))
        model.cpu()
        try:
            verified = verify_onnx(
                path,
                model,
                as_arguments(inputs),
                engines=list(engines),
                progress=not options.quiet,
            )
        finally:
            model.to(options.device)
    return {
        "findings": lint_onnx(path, options.target),
        "prediction": predict_int8(path, options.target),
        "verified": verified,
    }
