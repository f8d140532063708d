"""`export_onnx`: a Q/DQ ONNX file from a quantized model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pytorch_quant.export.bias_limit import raise_small_scales
from pytorch_quant.export.checks import check_quantizers, choose_opset
from pytorch_quant.export.dynamic import (
    dynamic_lstms,
    to_integer_products,
)
from pytorch_quant.export.external_data import save_checked
from pytorch_quant.export.initializers import (
    drop_traces,
    name_after_modules,
    store_integer_weights,
)
from pytorch_quant.export.int4 import store_blocks
from pytorch_quant.export.pairs import merge_equal_pairs
from pytorch_quant.export.recode import to_unsigned
from pytorch_quant.export.repairs.products import keep_products
from pytorch_quant.export.report import (
    ExportReport,
    LayerCounts,
    count_layers,
    count_other_operators,
)
from pytorch_quant.export.targets import UINT8_TARGETS, check_target, machine_notes
from pytorch_quant.export.tracing import traced
from pytorch_quant.export.transposes import fold_weight_transposes
from pytorch_quant.files import written_aside
from pytorch_quant.nn.modes import named_quantizers

WEIGHTS = ("int8", "float")


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor,
    path: str | os.PathLike[str],
    *,
    target: str = "tensorrt",
    opset: int | None = None,
    weights: str = "int8",
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamo: bool = True,
) -> ExportReport:
    """Write `model` as a Q/DQ ONNX file for one runtime.

    The model is exported in eval mode and comes back as it was. Quantizers that it does not reach
    in this mode are not in the file and need no range; disabled ones are float there. The file is
    written aside, checked and renamed, so that `path` is never half-written. Constants of more
    than 2 GB go to `<name>.data` beside it.

    Args:
        model: Calibrated.
        args: Example inputs: a tensor, or a tuple of arguments; a dict at its end holds keywords.
        path: The file to write.
        target: `"tensorrt"` for symmetric int8. `"onnxruntime"` and `"openvino"` for the same
            values with activations coded as uint8, which their x86 kernels want; they also take
            unsigned and dynamic quantizers. For ONNX Runtime, weight scales with which its
            integer bias would saturate are raised.
        opset: Version of the standard operator set; by default the exporter's own, or what the
            formats of the model need.
        weights: `"int8"` stores integer weights with a DequantizeLinear, a quarter of the size;
            `"float"` stores float weights with a Q/DQ pair, which TensorRT 8 wants.
        dynamic_shapes: Which dimensions vary, as in `torch.onnx.export`.
        input_names: Names of the graph inputs.
        output_names: Names of the graph outputs.
        dynamo: Use the current exporter of torch; if false, its older TorchScript one.

    Raises:
        OSError: `path` cannot be written.
        RuntimeError: uncalibrated quantizers that are not declared dynamic, naming them all.
        TypeError: `args` is neither a tensor nor a tuple; `opset` is no whole number.
        ValueError: quantizers that the target or ONNX has no form for, or with a range that is 0
            or not finite, naming them all; an opset that cannot hold the model; an unknown value
            of `target` or `weights`; more names than there are inputs or outputs.
        Exception: whatever the exporter of torch raises for a model that it cannot trace.
    """
    check_target(target)
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    started = time.perf_counter()
    if not isinstance(args, (tuple, torch.Tensor)):
        raise TypeError(
            f"args is a tensor or a tuple of arguments, got {type(args).__name__}; write "
            "(argument,) for one argument that is no tensor"
        )
    args = args if isinstance(args, tuple) else (args,)
    with written_aside(path) as aside:
        check_quantizers(model, args, target)
        asked = choose_opset(model, opset, dynamo=dynamo)
        with dynamic_lstms(model, target):
            proto = traced(
                model,
                args,
                opset=asked,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                dynamo=dynamo,
            )
        written = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
        if asked not in (None, written):
            raise ValueError(
                f"opset={asked} was asked for, and the exporter wrote {written}; leave opset out, "
                "or choose one that this torch writes"
            )
        counts = _finished(proto.graph, target, integers=weights == "int8")
        if target == "onnxruntime":
            keep_products(proto)
        kinds = [node.op_type for node in proto.graph.node]
        size = save_checked(proto, aside, Path(path))
    return ExportReport(
        path=Path(path),
        target=target,
        quantize_nodes=kinds.count("QuantizeLinear"),
        dequantize_nodes=kinds.count("DequantizeLinear"),
        integer_weights=counts.integer_weights,
        quantized_layers=counts.layers.quantized,
        weight_only_layers=counts.layers.weight_only,
        float_layers=counts.layers.float,
        float_quantizers=[n for n, q in named_quantizers(model).items() if q.disabled],
        raised_channels=counts.raised_channels,
        other_operators=count_other_operators(proto.graph),
        size=size,
        opset=written,
        seconds=time.perf_counter() - started,
        notes=machine_notes(target),
    )


class _Counts(NamedTuple):
    integer_weights: int
    raised_channels: int
    layers: LayerCounts


def _finished(graph: Any, target: str, *, integers: bool) -> _Counts:
    """Bring a traced graph into the form of `target`, in place."""
    merge_equal_pairs(graph)
    stored = store_blocks(graph, integers=integers)
    fold_weight_transposes(graph)
    raised = raise_small_scales(graph) if target == "onnxruntime" else 0
    if integers:
        stored += store_integer_weights(graph)
    name_after_modules(graph)
    if target == "onnxruntime":
        to_integer_products(graph)
    layers = count_layers(graph)
    if target in UINT8_TARGETS:
        # OpenVINO has an integer ConvTranspose for zero points of 0 alone.
        to_unsigned(graph, for_openvino=target == "openvino")
    drop_traces(graph)
    return _Counts(stored, raised, layers)
