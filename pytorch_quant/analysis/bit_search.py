"""The result of `search_bits`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pytorch_quant.analysis.noise import to_db
from pytorch_quant.analysis.plain_data import Result, shown_db
from pytorch_quant.scheme import Scheme
from pytorch_quant.tables import aligned


@dataclass(frozen=True)
class LayerBits:
    """One layer and the scheme it got.

    Attributes:
        name: The key of its rule.
        kind: `conv`, `conv_transpose` or `linear`.
        choice: The name of the scheme; `float` for None.
        error: What it adds to the predicted error.
        errors: The error of each choice that the layer can take, by name.
        weights: Elements of its weight.
        macs: Multiply-accumulates for the first batch.
    """

    name: str
    kind: str
    choice: str
    error: float
    errors: dict[str, float]
    weights: int
    macs: int


@dataclass(frozen=True)
class BitPoint:
    """One assignment of schemes, as predicted.

    Attributes:
        size: Bytes of all parameters and buffers, weights as packed codes with float32 scales.
        size_ratio: That, divided by the bytes of the float model.
        bops: Bit operations of the layers for the first batch.
        bops_ratio: That, divided by those in float, 32 x 32 bits.
        error: The sum over layers; with the method `sqnr` noise / signal of the output, with
            `fisher` the increase of the loss.
        choices: The name of the scheme of each layer.
    """

    size: float
    size_ratio: float
    bops: float
    bops_ratio: float
    error: float
    choices: dict[str, str]


@dataclass(frozen=True)
class BitSearch(Result):
    """What `search_bits` found; `print` it for tables.

    Attributes:
        method: How errors were measured.
        layers: A row for each layer, in the order of the model.
        chosen: The assignment.
        front: Assignments with the least error at other budgets, the largest first.
        rules: The assignment as rules for `quantize`, after those that were given.
    """

    method: str
    layers: list[LayerBits]
    chosen: BitPoint
    front: list[BitPoint]
    rules: dict[Any, Scheme | None] = field(repr=False)

    def __str__(self) -> str:
        rows = [("layer", "kind", "choice", "weights", "MACs", "error")]
        rows += [
            (
                row.name or "(model)",
                row.kind,
                row.choice,
                f"{row.weights:,}",
                f"{row.macs:,}",
                f"{row.error:.3g}",
            )
            for row in self.layers
        ]
        lines = [*aligned(rows, right=3), "", "predicted"]
        front = [self._line("front", point) for point in self.front]
        error = "SQNR dB" if self.method == "sqnr" else "loss"
        header = ("", "layers", "size, bytes", "of float", "bit operations", "of float", error)
        lines += aligned([header, self._line("chosen", self.chosen), *front], right=5)
        return "\n".join(lines)

    def _line(self, name: str, point: BitPoint) -> tuple[str, ...]:
        counts = Counter(point.choices.values())
        error = f"{point.error:.3g}"
        if self.method == "sqnr":
            error = shown_db(to_db(point.error))
        return (
            name,
            ", ".join(f"{count} {choice}" for choice, count in counts.items()),
            f"{point.size:,.0f}",
            f"{point.size_ratio:.1%}",
            f"{point.bops:,.0f}",
            f"{point.bops_ratio:.1%}",
            error,
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data; a type or function among the rules by its name.

        `quantize` takes these rules as well, where schemes are presets and keys are names. `rules`
        itself it always takes.
        """
        rules = {
            key if isinstance(key, str) else getattr(key, "__name__", str(key)): value
            for key, value in self.rules.items()
        }
        plain = super().as_dict()
        return plain | {"rules": {key: value and value.name for key, value in rules.items()}}


def choice_names(choices: Sequence[Scheme | None]) -> list[str]:
    """The names of schemes for tables."""
    return ["float" if scheme is None else scheme.name for scheme in choices]
