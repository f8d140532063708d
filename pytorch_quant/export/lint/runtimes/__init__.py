"""What TensorRT, ONNX Runtime and OpenVINO make of an operator between DQ and Q."""

from __future__ import annotations

from collections.abc import Callable

from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.runtimes import onnxruntime, openvino, tensorrt

# Whether the node runs on integers, and why.
Verdict = tuple[bool, str]
VERDICTS: dict[str, Callable[[Graph, Node], Verdict]] = {
    "tensorrt": tensorrt.verdict,
    "onnxruntime": onnxruntime.verdict,
    "openvino": openvino.verdict,
}
