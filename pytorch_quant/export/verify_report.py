"""What `verify_onnx` finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pytorch_quant.tables import aligned

LAYER_BY_LAYER = "layer by layer"


@dataclass(frozen=True)
class OutputRow:
    """One output of the file in one engine, beside the fake-quantized torch model.

    Attributes:
        engine: Where it ran; `"layer by layer"` for the run in which each layer is fed torch's own
            tensors.
        output: Name of the graph output.
        max_error: The largest absolute difference.
        cosine: Cosine of the angle between the two, 1 where they are equal.
        sqnr: Signal to quantization noise ratio in dB, infinite where they are equal.
        ok: Whether it is close enough. Integer outputs are judged layer by layer alone, as one
            flipped code may change them.
    """

    engine: str
    output: str
    max_error: float
    cosine: float
    sqnr: float
    ok: bool


@dataclass(frozen=True)
class Divergence:
    """The first tensor, in the order of the graph, that is not what torch computes.

    Attributes:
        layer: Qualified name of the layer, or the call such as `block/add#0`; `""` if unknown.
        node: Name of the ONNX node.
        tensor: Name of the tensor in the file.
        problem: What is wrong with it.
        engine: Where it was seen.
    """

    layer: str
    node: str
    tensor: str
    problem: str
    engine: str

    def __str__(self) -> str:
        where = f"layer {self.layer}" if self.layer else "a layer without a name"
        return f"{where}, node {self.node} ({self.tensor}) in {self.engine}: {self.problem}"


@dataclass(frozen=True)
class VerifyReport:
    """Whether a file computes what the fake-quantized model computes.

    An engine that refuses the file is listed; unless it was asked for, it says nothing about `ok`.

    Attributes:
        path: The file.
        rows: One for each engine and output.
        first_divergence: None if there is none.
        quantizers: Number of Q/DQ pairs of activations that were compared code by code.
        weights: Number of quantized weights that were compared.
        ties: Number of codes that differ by a step because the value lies on a tie.
        unmatched: Q/DQ nodes and quantizers without a counterpart; these were not compared alone,
            and the layers around them only as closely as their steps allow.
        not_run: Engines that did not run, and why.
        failed: Engines that cannot run the file, and what they say.
        missed: Labels of engines that were asked for and failed.
        seconds: Time that it took.
    """

    path: Path
    rows: list[OutputRow]
    first_divergence: Divergence | None
    quantizers: int
    weights: int
    ties: int
    unmatched: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing diverges, and every engine that ran or was asked for is close."""
        close = all(row.ok for row in self.rows)
        return close and self.first_divergence is None and not self.missed

    def _verdict(self) -> str:
        far = dict.fromkeys(row.engine for row in self.rows if not row.ok)
        if self.ok:
            return "ok"
        first = self.first_divergence
        if first is not None and first.engine == LAYER_BY_LAYER:
            return "NOT what torch computes"
        far |= dict.fromkeys(self.failed)
        return f"each layer is what torch computes, but too far from it in {', '.join(far)}"

    def __str__(self) -> str:
        table = [("engine", "output", "max error", "cosine", "SQNR dB", "")]
        for row in self.rows:
            numbers = (f"{row.max_error:.3g}", f"{row.cosine:.6f}", f"{row.sqnr:.1f}")
            table.append((row.engine, row.output, *numbers, "" if row.ok else "too far"))
        ties = f", {self.ties} code(s) one step apart on a tie" if self.ties else ""
        lines = [
            f"{self.path}: {self._verdict()} "
            f"({self.quantizers} activations and {self.weights} weights compared code by code"
            f"{ties})",
            *aligned(table),
        ]
        if self.first_divergence is not None:
            lines.append(f"first divergence: {self.first_divergence}")
        lines += [f"{engine} cannot run it: {why}" for engine, why in self.failed.items()]
        if self.unmatched:
            lines.append(f"no counterpart: {', '.join(self.unmatched)}")
        lines += [f"{engine}: {why}" for engine, why in self.not_run.items()]
        return "\n".join(lines)


def compare(expected: Tensor, found: Tensor) -> tuple[float, float, float]:
    """The largest absolute difference, the cosine and the SQNR in dB.

    NaN and infinities that are the same on both sides are no difference.
    """
    a, b = expected.double().flatten(), found.double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0, 1.0, math.inf
    noise = torch.where(same, 0.0, a - b)
    if not bool(noise.isfinite().all()):
        return math.nan, math.nan, -math.inf
    finite = a.isfinite() & b.isfinite()
    a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
    lengths = float(a.norm() * b.norm())
    cosine = float(a @ b) / lengths if lengths else 0.0
    signal = float(a @ a)
    sqnr = 10 * math.log10(signal / float(noise @ noise)) if signal else -math.inf
    return float(noise.abs().max()), cosine, sqnr
