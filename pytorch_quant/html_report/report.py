"""`report`: everything about a quantized model on one page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytorch_quant._version import __version__
from pytorch_quant.analysis import LayerErrors, Sensitivity, layer_errors, summary
from pytorch_quant.analysis.costs import arguments_of
from pytorch_quant.analysis.noise import checked_batches
from pytorch_quant.analysis.plain_data import with_unit
from pytorch_quant.analysis.sites import unwrapped
from pytorch_quant.analysis.switches import switched
from pytorch_quant.batches import Forward
from pytorch_quant.export import Prediction
from pytorch_quant.export.lint import Finding
from pytorch_quant.export.targets import check_target
from pytorch_quant.files import written_aside
from pytorch_quant.html_report.clip_lines import Panel, clip_panels
from pytorch_quant.html_report.exported import export_arguments, look_at_export
from pytorch_quant.html_report.gathered import Gathered, kinds_of, ranking_of
from pytorch_quant.html_report.page import page
from pytorch_quant.html_report.pictures import pyplot, write_pictures
from pytorch_quant.html_report.scores import (
    Evaluate,
    checked_accuracy,
    measured_accuracy,
    weight_sizes,
)
from pytorch_quant.html_report.seen_values import seen_values
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.quantization import placement_plan


@dataclass(frozen=True)
class ReportFile(os.PathLike[str]):
    """A page that was written; it can be used as its path.

    Attributes:
        path: The HTML file.
        pictures: The PNG files; empty without `pictures`.
        accuracy: Scores by name, the float one first; empty if there are none.
        errors: What `layer_errors` found.
        ranking: Layers, the most harmful first; `exclude(k)` gives rules.
        prediction: Which operators run on integers; None if the export failed.
        findings: What `lint_onnx` found.
        export_error: Why there is no file, or no latency; empty if nothing failed.
    """

    path: Path
    pictures: tuple[Path, ...]
    accuracy: dict[str, float]
    errors: LayerErrors
    ranking: Sensitivity
    prediction: Prediction | None
    findings: list[Finding]
    export_error: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        parts = [f"output SQNR {with_unit(self.errors.output_db)}"]
        parts += [f"{name} {score:.4g}" for name, score in self.accuracy.items()]
        if self.prediction is not None:
            count = len(self.prediction.rows) - len(self.prediction.float_rows)
            kinds = kinds_of(self.prediction)
            parts.append(f"{count} of {len(self.prediction.rows)} operators in {kinds}")
            parts.append(f"{len(self.findings)} lint findings")
        if self.export_error:
            parts.append(self.export_error.splitlines()[0])
        return f"{self.path}: {', '.join(parts)}"


def report(
    model: nn.Module,
    batches: Iterable[Any],
    path: str | os.PathLike[str] = "report.html",
    *,
    float_model: nn.Module | None = None,
    rules: Mapping[Any, Any] | None = None,
    accuracy: Mapping[str, float] | None = None,
    evaluate: Evaluate | None = None,
    example_inputs: Any = None,
    ranking: Sensitivity | None = None,
    latency: bool = False,
    target: str = "tensorrt",
    pictures: bool | str | os.PathLike[str] = False,
    forward: Forward | None = None,
    progress: bool = True,
) -> ReportFile:
    """Write one HTML page about what quantization did to `model`, and what to do about it.

    On the page: accuracy, size and latency beside float; the SQNR of each layer and tensor;
    histograms of activations and weights with the range that each calibration method would take on
    these batches; the placement; which operators run on integers, and lint findings, from a file
    that is exported meanwhile; layers ranked by harm, with rules to paste. The page needs no
    network and runs no scripts. It is written aside and renamed. The model comes back as it was.

    The batches run three times, and twice for each layer: a few are enough. A model that cannot be
    exported still has its page, which shows the error.

    Args:
        model: Quantized and calibrated, by any method. Disabled quantizers stay off.
        batches: Passed to the model as in `calibrate`; an iterator is kept in memory.
        path: The file to write.
        float_model: The model before `quantize`. With it the placement has its reasons, and
            `evaluate` runs on it instead of on the model with its quantizers off.
        rules: Those that `quantize` had, for the reasons and in front of the rules to paste.
        accuracy: Scores that you have, the float one first: `{"float": 76.1, "int8": 75.9}`.
        evaluate: `evaluate(model)` gives a score, higher is better, and is run twice.
        example_inputs: As for `quantize`; by default the first batch. The file is exported with
            them, and timed with batches of their size.
        ranking: What `sensitivity` returned; by default layers are ranked by SQNR.
        latency: Time the file beside a float one on the CPU: in OpenVINO for that target,
            otherwise in ONNX Runtime.
        target: `"tensorrt"`, `"onnxruntime"` or `"openvino"`.
        pictures: Draw the pictures as PNG files too: true for the folder `<stem>_pictures` beside
            the page, or the path of a folder.
        forward: `forward(model, batch)` runs one batch and returns the output.
        progress: Show progress bars.

    Raises:
        CalibrationError: NaN or Inf at a quantizer, naming it.
        ImportError: `pictures` without matplotlib.
        OSError: `path` or the folder of pictures cannot be written to, or is no file or folder.
        RuntimeError: uncalibrated quantizers, naming them; or a batch on another device.
        TypeError: a model is no module, `batches` is one tensor or no iterable, a batch or example
            inputs of a wrong type, a ranking that is none, or a score that is no number.
        ValueError: no quantizers, none enabled, quantizers in `float_model`, no batches, an unknown
            target, both `accuracy` and `evaluate`, no floating-point output, rules that do not
            hold; or `forward` does not call the model and there are no example inputs.
    """
    check_target(target)
    scores = checked_accuracy(accuracy, evaluate)
    _check_models(model, float_model)
    if ranking is not None and not isinstance(ranking, Sensitivity):
        raise TypeError(f"ranking is what sensitivity() returned, got {type(ranking).__name__}")
    checked_batches(batches, "report")
    file = Path(path)
    folder = file.with_name(f"{file.stem}_pictures")
    if pictures:
        pyplot()
        folder = folder if pictures is True else Path(pictures)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; pictures= takes a folder")
    if isinstance(batches, Iterator):
        batches = list(batches)
    with written_aside(file) as aside:
        inner = unwrapped(model)
        # First, as it names the quantizer that NaN reaches.
        inputs, panels = _histograms(inner, batches, example_inputs, forward, progress)
        # Before the long passes: its rules and its model may not fit.
        plan = None if float_model is None else placement_plan(float_model, inputs, rules, target)
        errors = layer_errors(inner, batches, forward=forward, progress=progress)
        with switched(inner, forward, "report") as switches:
            holders = {
                name: tuple(switch.holder.name for switch in held)
                for name, held in switches.all.items()
            }
            if evaluate is not None:
                scores = measured_accuracy(switches, model, float_model, evaluate, progress)
        found = Gathered(
            model=type(inner).__name__,
            versions=f"pytorch_quant {__version__}, torch {torch.__version__}",
            errors=errors,
            ranking=ranking_of(errors, holders) if ranking is None else ranking,
            panels=panels,
            table=summary(inner),
            plan=plan,
            exported=look_at_export(
                inner, export_arguments(inputs), target, latency=latency, progress=progress
            ),
            sizes=weight_sizes(inner),
            accuracy=scores,
            ruled=rules is not None,
        )
        drawn: tuple[Path, ...] = ()
        if pictures:
            drawn = write_pictures(found, folder, progress)
        aside.write_text(page(found), encoding="utf-8")
    seen = found.exported
    return ReportFile(
        file, drawn, scores, errors, found.ranking, seen.prediction, seen.findings, seen.error
    )


def _check_models(model: Any, float_model: Any) -> None:
    for name, given in (("model", model), ("float_model", float_model)):
        if not isinstance(given, nn.Module) and (name == "model" or given is not None):
            raise TypeError(f"report: {name} is a module, got {type(given).__name__}")
    held = [] if float_model is None else [*named_quantizers(unwrapped(float_model))]
    if held:
        raise ValueError(
            f"report: float_model has quantizers, such as {held[0]}; quantize() edits in place, so "
            "pass the copy.deepcopy(model) that was made before it"
        )


def _histograms(
    model: nn.Module, batches: Any, example_inputs: Any, forward: Forward | None, progress: bool
) -> tuple[Any, list[Panel]]:
    """Example inputs, those of the first batch by default, and a panel for each quantizer."""
    found = {"inputs": example_inputs}
    if example_inputs is not None:
        export_arguments(example_inputs)
    with switched(model, forward, "report") as switches:

        def first(batch: Any) -> None:
            if found["inputs"] is None:
                found["inputs"] = arguments_of(switches.model, lambda: switches.run(batch))

        seen = seen_values(switches, batches, first, progress)
    return found["inputs"], clip_panels(seen, progress)
