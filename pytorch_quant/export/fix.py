"""`fix_onnx`: what in a Q/DQ file can be repaired without another calibration."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_quant.export.lint import Finding, lint_onnx
from pytorch_quant.export.pairs import merge_equal_pairs
from pytorch_quant.export.recode import to_signed, to_unsigned
from pytorch_quant.export.repairs.products import keep_products
from pytorch_quant.export.repairs.quantizers import (
    use_standard_domain,
    write_axes,
    write_zero_points,
)
from pytorch_quant.export.repairs.redundant import drop_before_moves, drop_requantized
from pytorch_quant.export.repairs.weights import (
    float_biases,
    scale_zero_channels,
    sign_weights,
    store_codes,
)
from pytorch_quant.export.saving import external_files, load_data, read_model, save_model
from pytorch_quant.export.targets import check_target
from pytorch_quant.export.transposes import fold_weight_transposes
from pytorch_quant.tables import aligned


@dataclass(frozen=True)
class FixReport:
    """What was repaired, and what is left.

    Attributes:
        path: The file that was written.
        target: The runtime that it is for.
        repairs: How often each repair was needed, in the order in which they ran.
        findings: What `lint_onnx` still finds.
    """

    path: Path
    target: str
    repairs: dict[str, int]
    findings: list[Finding]

    def __str__(self) -> str:
        rows = [(name, str(count)) for name, count in self.repairs.items()]
        lines = [f"{self.path}, for {self.target}"]
        lines += aligned([("repaired", ""), *rows], right=1) if rows else ["nothing to repair"]
        if not self.findings:
            return "\n".join([*lines, "no findings left"])
        counts = Counter(finding.severity for finding in self.findings)
        left = ", ".join(f"{count} {severity}" for severity, count in counts.items())
        return "\n".join([*lines, f"findings left: {left}", *map(str, self.findings)])


def fix_onnx(
    path_in: str | os.PathLike[str],
    path_out: str | os.PathLike[str],
    *,
    target: str = "tensorrt",
) -> FixReport:
    """Repair a Q/DQ ONNX file, whoever made it, without changing what it computes.

    Outputs are bit-identical in ONNX Runtime with its optimizations off. What cannot be repaired
    that way stays a finding: asymmetric zero points, uint8 codes with zero point 0 (int8 has no
    codes above 127), pairs that only cost time, as on a graph output, but round.

    Where `path_in` has external data, `path_out` gets a file of it, `<name>.data`, beside it; if
    `path_in` itself uses a file of that name, one of another name, and the old file stays.

    Args:
        path_in: The file to read.
        path_out: The file to write, whole or not at all; may be `path_in`.
        target: `"tensorrt"` for signed codes and pairs where its fusions want them;
            `"onnxruntime"` or `"openvino"` for activations as uint8 with zero point 128, which
            their integer kernels on x86 want.

    Raises:
        OSError: a file cannot be read or written, or external data is missing.
        ValueError: `path_in` is no ONNX file or truncated; an unknown target.
    """
    check_target(target)
    source, out = Path(os.fspath(path_in)), Path(os.fspath(path_out))
    model = read_model(source)
    used = external_files(model)
    load_data(model, source.parent)
    repairs = repair_model(model, target)
    external = None
    if used:
        external, k = f"{out.name}.data", 1
        taken = {(source.parent / name).resolve() for name in used}
        while (out.parent / external).resolve() in taken:
            external, k = f"{out.name}_{k}.data", k + 1
    findings = lint_onnx(model, target)
    save_model(model, out, external=external)
    return FixReport(out, target, repairs, findings)


def repair_model(model: Any, target: str) -> dict[str, int]:
    """Repair an `onnx.ModelProto` in place, all its data loaded; see `fix_onnx`.

    Returns:
        How often each repair was needed.
    """
    _inline(model)
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    done = {}
    for name, repair in _repairs(target, opset):
        done[name] = repair(model.graph)
    if target == "onnxruntime":
        done["bias kept from making a Gemm that runs in float"] = keep_products(model)
    return {name: count for name, count in done.items() if count}


def _repairs(target: str, opset: int) -> list[tuple[str, Callable[[Any], int]]]:
    steps: list[tuple[str, Callable[[Any], int]]] = [
        ("Q/DQ of com.microsoft made standard", lambda graph: use_standard_domain(graph, opset)),
        ("axis written", lambda graph: write_axes(graph, opset)),
        ("zero point written", write_zero_points),
    ]
    if target == "tensorrt":
        # The others take a bias in int32.
        steps.append(("bias stored as float", float_biases))
    steps += [
        ("weight stored as codes", store_codes),
        ("weight of uint8 made int8", sign_weights),
        ("scale of 0 in a weight raised", scale_zero_channels),
        ("Transpose of a weight folded", fold_weight_transposes),
    ]
    if target == "tensorrt":
        steps.append(("activation of uint8 made int8", to_signed))
    else:
        openvino = target == "openvino"
        recode = functools.partial(to_unsigned, for_openvino=openvino)
        steps.append(("activation of int8 made uint8", recode))
    steps += [
        ("Q behind a DQ of equal scale dropped", drop_requantized),
        ("node of equal scale on one tensor merged", merge_equal_pairs),
    ]
    if target == "tensorrt":
        # The others run MaxPool or Reshape on integers where pairs are on both sides.
        steps.append(
            ("pair in front of an operator that keeps the grid dropped", drop_before_moves)
        )
    return steps


def _inline(model: Any) -> None:
    """Put local functions that hold Q/DQ into the graph."""
    import onnx.inliner

    quantized = ("QuantizeLinear", "DequantizeLinear")
    if any(node.op_type in quantized for f in model.functions for node in f.node):
        model.CopyFrom(onnx.inliner.inline_local_functions(model))
