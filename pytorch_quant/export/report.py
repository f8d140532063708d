"""What `export_onnx` tells of a file that it wrote."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_quant.export.recode import code_inputs
from pytorch_quant.export.wiring import Wiring, is_standard

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_DYNAMIC_LSTM = "DynamicQuantizeLSTM"


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file.
        target: The runtime that it is for.
        quantize_nodes: Number of QuantizeLinear nodes.
        dequantize_nodes: Number of DequantizeLinear nodes.
        integer_weights: Number of weights stored as integers.
        quantized_layers: Number of convolutions and products with a constant weight whose input
            and weight are both quantized, and of dynamically quantized LSTMs.
        weight_only_layers: Number of those with a quantized weight and a float input.
        float_layers: Names of the nodes of the others.
        float_quantizers: Names of disabled quantizers, whose tensors are float in the file.
        raised_channels: Number of weight scales that were raised for the integer bias of ONNX
            Runtime.
        other_operators: Number of nodes for each operator outside of the standard domain.
        size: Bytes of the file, external data included.
        opset: Version of the standard operator set.
        seconds: Time that the export took.
        notes: What to know before running the file on this machine.
    """

    path: Path
    target: str
    quantize_nodes: int
    dequantize_nodes: int
    integer_weights: int
    quantized_layers: int
    weight_only_layers: int
    float_layers: tuple[str, ...]
    float_quantizers: list[str]
    raised_channels: int
    other_operators: dict[str, int]
    size: int
    opset: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.path} for {self.target}: {self.size / 1e6:.2f} MB, opset {self.opset}, "
            f"{self.seconds:.1f} s",
            f"  {self.quantize_nodes} Q, {self.dequantize_nodes} DQ, {self.integer_weights} integer"
            f" weights; {_layers(self.quantized_layers, 'quantized')}",
        ]
        if self.weight_only_layers:
            lines.append(f"  {_layers(self.weight_only_layers)} with quantized weights alone")
        if self.float_layers:
            count = _layers(len(self.float_layers), "float")
            lines.append(f"  {count}: {', '.join(self.float_layers)}")
        if self.float_quantizers:
            lines.append(f"  disabled quantizers: {', '.join(self.float_quantizers)}")
        if self.raised_channels:
            lines.append(
                f"  {self.raised_channels} weight scales raised, so that no bias saturates in int32"
            )
        if self.other_operators:
            counts = (f"{n} {name}" for name, n in self.other_operators.items())
            lines.append(f"  outside of the standard domain: {', '.join(counts)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _layers(count: int, kind: str = "") -> str:
    words = [str(count), kind, "layer" if count == 1 else "layers"]
    return " ".join(word for word in words if word)


@dataclass(frozen=True)
class LayerCounts:
    """How the layers with a constant weight are quantized: see `ExportReport`."""

    quantized: int
    weight_only: int
    float: tuple[str, ...]


def count_layers(graph: Any) -> LayerCounts:
    """Tell apart the convolutions and products of a graph that have a constant weight."""
    wiring = Wiring(graph)
    quantized = weight_only = 0
    plain = []
    for node in graph.node:
        if is_standard(node, "MatMulInteger") or node.op_type == _DYNAMIC_LSTM:
            quantized += 1
            continue
        if not is_standard(node, *_WEIGHTED) or node.input[1] not in wiring.constants:
            # Codes under a DequantizeLinear are computed from constants, too.
            continue
        if not _behind_dq(wiring, node.input[1]):
            plain.append(node.name)
        elif _behind_dq(wiring, node.input[0]):
            quantized += 1
        else:
            weight_only += 1
    return LayerCounts(quantized, weight_only, tuple(plain))


def count_other_operators(graph: Any) -> dict[str, int]:
    """The number of nodes for each operator outside of the standard domain."""
    others = [n for n in graph.node if not is_standard(n, n.op_type)]
    return dict(Counter(f"{node.domain}.{node.op_type}" for node in others))


def _behind_dq(wiring: Wiring, tensor: str) -> bool:
    """Whether a tensor comes from a DequantizeLinear, moved at most."""
    node = wiring.producers.get(tensor)
    while node is not None and code_inputs(node):
        node = wiring.producers.get(node.input[code_inputs(node)[0]])
    return node is not None and is_standard(node, "DequantizeLinear")
