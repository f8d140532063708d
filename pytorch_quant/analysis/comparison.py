"""The result of `compare_models`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytorch_quant.analysis.plain_data import Result, shown_db
from pytorch_quant.tables import aligned


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that a module of both models returned.

    Attributes:
        name: The qualified name of the module; `""` is the model.
        kind: Its class in the first model.
        call: 0 for the first time that the module ran, 1 for the second.
        output: Which tensor of the output, `""` where that is a tensor, else its path: `[0]`,
            `['logits']`.
        shape: In the first model.
        sqnr_db: `10 log10(sum(a**2) / sum((b - a)**2))`, dB, over what is finite in `a`; NaN
            where that is nothing, or shapes differ.
        max_difference: The largest `|b - a|`; entries that are NaN in both count as equal.
        cosine: `sum(a b) / (||a|| ||b||)`, over what is finite in `a`; 1 for two tensors of zeros.
        note: Why there is nothing to compare; empty otherwise.
    """

    name: str
    kind: str
    call: int
    output: str
    shape: tuple[int, ...]
    sqnr_db: float
    max_difference: float
    cosine: float
    note: str = ""

    @property
    def label(self) -> str:
        """`layer1.conv`, `layer1.conv (call 1)[0]`."""
        call = f" (call {self.call})" if self.call else ""
        return f"{self.name or '(model)'}{call}{self.output}"


@dataclass(frozen=True)
class WeightDifference:
    """A parameter of both models, in the second as its quantizer gives it.

    Attributes:
        name: Its qualified name.
        format: The format of its quantizer in the second model; `float` without one.
        sqnr_db: As for tensors.
        max_difference: The largest `|b - a|`.
        note: Why there is nothing to compare; empty otherwise.
    """

    name: str
    format: str
    sqnr_db: float
    max_difference: float
    note: str = ""


@dataclass(frozen=True)
class ModelComparison(Result):
    """What `compare_models` found; `print` it for tables.

    Attributes:
        tensors: In the order in which the modules of the first model finish.
        weights: The parameters that differ or are quantized, in the order of the first model.
        only_in_a: Names of modules that ran and of parameters in the first model alone.
        only_in_b: The same of the second model, quantizers left out.
    """

    tensors: list[TensorDifference]
    weights: list[WeightDifference]
    only_in_a: list[str]
    only_in_b: list[str]

    @property
    def first_divergence(self) -> TensorDifference | None:
        """The first tensor that is not the same, bit for bit; None if all are."""
        return next((t for t in self.tensors if t.note or t.max_difference != 0), None)

    def __str__(self) -> str:
        lines = []
        if self.tensors:
            rows = [("tensor", "kind", "shape", "SQNR dB", "max difference", "cosine")]
            rows += [
                (
                    row.label,
                    row.kind,
                    "x".join(map(str, row.shape)) or "()",
                    row.note or shown_db(row.sqnr_db),
                    "-" if row.note else f"{row.max_difference:.4g}",
                    "-" if row.note or math.isnan(row.cosine) else f"{row.cosine:.6f}",
                )
                for row in self.tensors
            ]
            lines = aligned(rows, right=3)
            first = self.first_divergence
            where = "none" if first is None else first.label
            lines += ["", f"first difference: {where}"]
        if self.weights:
            weights = [("weight", "format", "SQNR dB", "max difference")]
            weights += [
                (
                    w.name,
                    w.format,
                    w.note or shown_db(w.sqnr_db),
                    "-" if w.note else f"{w.max_difference:.4g}",
                )
                for w in self.weights
            ]
            lines += ["", *aligned(weights, right=2)]
        for which, names in (("first", self.only_in_a), ("second", self.only_in_b)):
            if names:
                lines += ["", f"only in the {which} model: {', '.join(names)}"]
        return "\n".join(lines).lstrip("\n")
