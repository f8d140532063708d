"""`verify_onnx`: does a file compute what the fake-quantized model computes?"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pytorch_quant.export.arguments import split_arguments, tensor_leaves
from pytorch_quant.export.culprit import in_one_part, in_the_whole
from pytorch_quant.export.cut_graph import CutGraph
from pytorch_quant.export.engines import absence, check_engine, open_session
from pytorch_quant.export.ports import ports, read_onnx
from pytorch_quant.export.qdq_sites import Site, find_sites
from pytorch_quant.export.session import check_inputs
from pytorch_quant.export.simulation import simulate
from pytorch_quant.export.verify_layers import (
    Difference,
    check_layers,
    layer_of_difference,
    makes_steps,
)
from pytorch_quant.export.verify_report import (
    LAYER_BY_LAYER,
    Divergence,
    OutputRow,
    VerifyReport,
    compare,
)
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.optional import how_to_install

# onnx.reference loops in Python over what others do in one call.
_REFERENCE_ENTRIES = 2**21
_REFERENCE_NODES = 400
_LABELS = {
    "onnxruntime": ("ONNX Runtime", False),
    "reference": ("onnx.reference", False),
    "openvino": ("OpenVINO", True),
    "tensorrt": ("TensorRT", True),
}


def verify_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    args: Any,
    *,
    reference: bool | None = None,
    engines: Sequence[str] | None = None,
    min_sqnr: float = 20.0,
    progress: bool = True,
) -> VerifyReport:
    """Compare an exported file with the fake-quantized model that it came from.

    First layer by layer, in ONNX Runtime with optimizations off, or where it is not installed in
    `onnx.reference`: every layer and every quantizer is fed torch's own tensors. Outputs of layers
    have to agree up to the rounding of sums, codes have to be equal; a code may be one step off
    where the value lies within 1e-3 steps of a tie. Then from end to end, in ONNX Runtime with
    optimizations off and on, OpenVINO and TensorRT where they are installed, and in
    `onnx.reference`. There roundings add up and flip codes, so that outputs agree up to `min_sqnr`;
    where they do not, bisection finds the tensor where it begins.

    A bfloat16 model runs in `onnx.reference` alone, as others have no arrays of that type.

    Args:
        path: The file.
        model: The quantized model; it comes back as it was.
        args: Inputs as for `export_onnx`: a tensor, or a tuple of arguments. Real ones say more
            than random ones.
        reference: Run `onnx.reference`, which is slow; by default for small graphs.
        engines: Where to run it from end to end, of `engines.ENGINES`; by default wherever it can.
            Runtimes have faults of their own: leave out those that the file is not meant for.
        min_sqnr: dB; outputs below it are too far from torch's.
        progress: Show a progress bar when it takes over a second.

    Returns:
        The report; `report.ok` is the verdict.

    Raises:
        ImportError: onnx or an engine that was asked for is not installed; or ONNX Runtime is not,
            and the graph is large.
        OSError: the file or its external data is missing.
        RuntimeError: what compares the layers cannot run the file.
        TypeError: `args` has another type than the file takes; `engines` is no list.
        ValueError: no ONNX file, or cut short; `args` that do not fit it; a model without enabled
            quantizers; a file that does not come from this model; an unknown engine.
    """
    started = time.perf_counter()
    if isinstance(engines, str):
        raise TypeError(f"engines is a list of names, got {engines!r}; write [{engines!r}]")
    for name in engines or ():
        check_engine(name)
    proto = _whole(path)
    if not any(q.quantizes for q in named_quantizers(model).values()):
        raise ValueError(
            f"{type(model).__name__} has no enabled quantizer, so it cannot be what {path} was "
            "made from; pass the quantized model that was exported"
        )
    positional, keywords = split_arguments(args)
    inputs = [t.detach().cpu() for t in tensor_leaves((positional, keywords))]
    given, made = ports(proto)
    check_inputs(given, inputs)
    with tqdm(total=3, desc="verify", delay=1.0, leave=False, disable=not progress) as bar:
        bar.set_postfix_str("torch", refresh=False)
        simulation = simulate(model, positional, keywords)
        outputs = _named_outputs([port.name for port in made], simulation.outputs, path)
        sites, unmatched = find_sites(proto.graph, model, simulation)
        if not sites and not any(map(makes_steps, proto.graph.node)):
            raise ValueError(
                f"no Q/DQ pair of {path} belongs to a quantizer of {type(model).__name__}; pass "
                "the model that was exported, and a file of export_onnx or torch.onnx.export"
            )
        bar.update()
        bar.set_postfix_str(LAYER_BY_LAYER, refresh=False)
        halves = any(t.dtype == torch.bfloat16 for t in (*inputs, *outputs.values()))
        small = _is_small(proto, sites)
        feeds = {port.name: tensor for port, tensor in zip(given, inputs, strict=True)}
        engine = "reference" if halves else _engine_of_layers(small, reference, engines)
        cut = CutGraph(proto, sites, feeds, engine)
        try:
            cut.evaluate()
        except Exception as error:
            if halves or engine == "onnxruntime":
                raise
            raise RuntimeError(
                f"onnx.reference cannot run the layers one by one ({error}); ONNX Runtime may, "
                f"install it with {how_to_install('onnxruntime')}"
            ) from error
        checks = check_layers(proto, cut, sites, outputs, min_sqnr)
        first = None
        rows = []
        for name, expected in outputs.items():
            found = cut.tensors.get(name, expected)
            good = bool(checks.good_outputs and checks.good_outputs[name])
            rows.append(OutputRow(LAYER_BY_LAYER, name, *_compared(expected, found), good))
        if checks.first is not None:
            layers = simulate(model, positional, keywords, layers=True)
            found_here = _divergence(proto, cut, checks.first, layers, sites)
            first = replace(found_here, engine=LAYER_BY_LAYER)
        bar.update()
        runs, not_run = _engines(small, halves, reference, engines)
        failed: dict[str, str] = {}
        bar.total = 2 + len(runs)
        for label, (name, optimize) in runs.items():
            bar.set_postfix_str(label, refresh=False)
            try:
                session = open_session(proto, name, optimize=optimize)
                results = session.run(inputs)
            except Exception as error:
                failed[label] = str(error)
                continue
            found_rows = [
                _end_to_end(label, output, expected, found, min_sqnr)
                for (output, expected), found in zip(outputs.items(), results, strict=True)
            ]
            rows += found_rows
            if first is None and not all(row.ok for row in found_rows):
                layers = simulate(model, positional, keywords, layers=True)
                found_in = in_the_whole(cut, proto, name, sites, inputs, layers, min_sqnr)
                first = replace(found_in, engine=label)
            bar.update()
    return VerifyReport(
        path=Path(path),
        rows=rows,
        first_divergence=first,
        quantizers=sum(not site.weight for site in sites),
        weights=sum(site.weight for site in sites),
        ties=checks.ties,
        unmatched=unmatched,
        not_run=not_run,
        failed=failed,
        missed=[] if engines is None else list(failed),
        seconds=time.perf_counter() - started,
    )


def _whole(path: str | os.PathLike[str]) -> Any:
    proto = read_onnx(path)
    if proto.functions:
        import onnx.inliner

        proto = onnx.inliner.inline_local_functions(proto)
    return proto


def _named_outputs(
    names: list[str], outputs: list[Tensor], path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    if len(names) != len(outputs):
        raise ValueError(
            f"{path} has {len(names)} output(s), {', '.join(names)}, and the model returns "
            f"{len(outputs)} tensor(s); pass the model that was exported"
        )
    return dict(zip(names, outputs, strict=True))


def _compared(expected: Tensor, found: Tensor) -> tuple[float, float, float]:
    if expected.shape != found.shape:
        return float("nan"), float("nan"), -float("inf")
    return compare(expected, found)


def _end_to_end(
    label: str, output: str, expected: Tensor, found: Tensor, min_sqnr: float
) -> OutputRow:
    numbers = _compared(expected, found)
    judged = expected.is_floating_point() or expected.shape != found.shape
    return OutputRow(label, output, *numbers, not judged or numbers[2] >= min_sqnr)


def _divergence(
    proto: Any, cut: CutGraph, difference: Difference, simulation: Any, sites: list[Site]
) -> Divergence:
    node = next(n for n in proto.graph.node if difference.tensor in n.output)
    if difference.expected is not None:
        return in_one_part(cut, difference, simulation, sites)
    layer = layer_of_difference(difference)
    name = difference.site.name if difference.site is not None else ""
    problem = f"{name}: {difference.problem}"
    return Divergence(layer, node.name, difference.tensor, problem, cut.engine)


def _is_small(proto: Any, sites: list[Site]) -> bool:
    """Whether `onnx.reference` is done with it in seconds."""
    entries = sum(site.call.x.numel() for site in sites)
    return entries <= _REFERENCE_ENTRIES and len(proto.graph.node) <= _REFERENCE_NODES


def _engine_of_layers(small: bool, reference: bool | None, asked: Sequence[str] | None) -> str:
    """Where to run the layers one by one: in `onnx.reference` only where nothing faster can."""
    try:
        check_engine("onnxruntime")
    except ImportError as error:
        if (small or "reference" in (asked or ())) if reference is None else reference:
            return "reference"
        raise ImportError(
            f"{error}. Or pass reference=True (on the command line --engine reference), which is "
            "slow for a large graph"
        ) from error
    return "onnxruntime"


def _engines(
    small: bool, halves: bool, reference: bool | None, asked: Sequence[str] | None
) -> tuple[dict[str, tuple[str, bool]], dict[str, str]]:
    """What to run by label, and why the others do not run."""
    runs: dict[str, tuple[str, bool]] = {}
    not_run: dict[str, str] = {}
    for name, (label, optimize) in _LABELS.items():
        wanted = asked is None or name in asked
        if name == "reference" and reference is not None:
            wanted = reference
        if not wanted:
            not_run[label] = "left out"
        elif name == "reference" and not (reference or small or halves or asked):
            not_run[label] = "left out of a large graph; pass reference=True"
        elif halves and name != "reference":
            not_run[label] = "takes no bfloat16 arrays"
        elif not asked and (missing := absence(name)):
            not_run[label] = missing
        else:
            runs[label] = (name, optimize)
            if name == "onnxruntime":
                runs[f"{label}, optimized"] = (name, True)
    return runs, not_run
