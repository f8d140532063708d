"""`export_onnx`: a Q/DQ ONNX file from a quantized model."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytorch_quant.export.checks import check_quantizers, choose_opset
from pytorch_quant.export.initializers import (
    drop_traces,
    name_after_quantizers,
    store_integer_weights,
)
from pytorch_quant.export.pairs import merge_equal_pairs
from pytorch_quant.files import written_aside
from pytorch_quant.nn.modes import named_quantizers, preserved_modes

WEIGHTS = ("int8", "float")
_NO_LIMIT = 2**40
# Protocol buffers cannot be larger.
_LARGEST_FILE = 2**31 - 1


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file.
        quantize_nodes: Number of QuantizeLinear nodes.
        dequantize_nodes: Number of DequantizeLinear nodes.
        integer_weights: Number of weights stored as integers.
        float_quantizers: Names of disabled quantizers, whose tensors are float in the file.
        size: Bytes of the file.
        opset: Version of the standard operator set.
        seconds: Time that the export took.
    """

    path: Path
    quantize_nodes: int
    dequantize_nodes: int
    integer_weights: int
    float_quantizers: list[str]
    size: int
    opset: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.quantize_nodes} Q, {self.dequantize_nodes} DQ, "
            f"{self.integer_weights} integer weights, {self.size / 1e6:.2f} MB, opset {self.opset},"
            f" {self.seconds:.1f} s"
        )


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    weights: str = "int8",
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ExportReport:
    """Write `model` as a Q/DQ ONNX file for TensorRT and ONNX Runtime.

    The model is exported in eval mode and comes back as it was. Quantizers that it does not reach
    in this mode are not in the file and need no range. The file is written aside and renamed, so
    that `path` is never half-written.

    Args:
        model: Calibrated.
        args: Example inputs: a tensor, or a tuple of arguments.
        path: The file to write.
        opset: Version of the standard operator set; by default the exporter's own.
        weights: `"int8"` stores integer weights with a DequantizeLinear, a quarter of the size;
            `"float"` stores float weights with a Q/DQ pair, which TensorRT 8 wants.
        dynamic_shapes: Which dimensions vary, as in `torch.onnx.export`.
        input_names: Names of the graph inputs.
        output_names: Names of the graph outputs.

    Raises:
        OSError: `path` cannot be written.
        RuntimeError: uncalibrated quantizers that are not declared dynamic, naming them all.
        TypeError: `args` is neither a tensor nor a tuple.
        ValueError: quantizers that have no ONNX form or a range of 0, naming them all; an opset
            that cannot hold the model; more than 2 GiB; an unknown value of `weights`.
    """
    import onnx
    import onnxscript.optimizer

    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    started = time.perf_counter()
    if not isinstance(args, (tuple, torch.Tensor)):
        raise TypeError(
            f"args is a tensor or a tuple of arguments, got {type(args).__name__}; write "
            "(argument,) for one argument that is no tensor"
        )
    args = args if isinstance(args, tuple) else (args,)
    check_quantizers(model, args)
    asked = choose_opset(model, opset)
    with written_aside(path) as aside:
        with preserved_modes(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval()
            for quantizer in named_quantizers(model).values():
                quantizer.disable_calib()
            program = torch.onnx.export(
                model,
                args,
                dynamo=True,
                verbose=False,
                opset_version=asked,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
            )
        assert program is not None
        # The exporter's own folding leaves large constants, such as the scales of a vocabulary.
        onnxscript.optimizer.optimize_ir(
            program.model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT
        )
        proto = program.model_proto
        written = max(o.version for o in proto.opset_import if o.domain == "")
        if asked not in (None, written):
            raise ValueError(
                f"opset={asked} was asked for, and the exporter wrote {written}; leave opset out, "
                "or choose one that this torch writes"
            )
        merge_equal_pairs(proto.graph)
        stored = store_integer_weights(proto.graph) if weights == "int8" else 0
        name_after_quantizers(proto.graph)
        drop_traces(proto.graph)
        if proto.ByteSize() > _LARGEST_FILE:
            raise ValueError(
                f"the file would have {proto.ByteSize() / 2**30:.1f} GiB, and ONNX files hold 2; "
                "quantize more of the large layers, or store half-precision weights"
            )
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, aside)
        size = aside.stat().st_size
    kinds = [node.op_type for node in proto.graph.node]
    return ExportReport(
        path=Path(path),
        quantize_nodes=kinds.count("QuantizeLinear"),
        dequantize_nodes=kinds.count("DequantizeLinear"),
        integer_weights=stored,
        float_quantizers=[n for n, q in named_quantizers(model).items() if q.disabled],
        size=size,
        opset=written,
        seconds=time.perf_counter() - started,
    )
