"""A ranking of layers by the harm of quantizing them, and the rules that leave some float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from pytorch_quant.analysis.plain_data import Result, shown_db
from pytorch_quant.tables import aligned

UNITS = {
    "sqnr": "SQNR of the output, dB",
    "loss": "increase of the loss",
    "fisher": "predicted increase of the loss",
    "evaluate": "drop of the score",
}
"""What the score of each method is."""


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer or call.

    Attributes:
        name: The key of its rule.
        kind: `Conv2d`, `add`, ...
        score: What quantizing it alone does; see `UNITS`. Larger is worse, but for `sqnr`.
        rank: 1 is the most harmful.
        quantizers: The qualified names of its quantizers.
    """

    name: str
    kind: str
    score: float
    rank: int
    quantizers: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity(Result):
    """The ranking that `sensitivity` made; `print` it for a table.

    Attributes:
        method: How it was made.
        rows: Layers and calls, the most harmful first.
        reference: The score or the loss without quantization; None where there is none.
        total: What quantizing all of them does, in the unit of the rows; None where the method
            does not measure it.
    """

    method: str
    rows: list[LayerSensitivity]
    reference: float | None = None
    total: float | None = None
    _measure: Callable[[frozenset[str], bool], float] | None = field(
        default=None, repr=False, compare=False
    )

    def exclude(
        self, k: int | None = None, *, max_drop: float | None = None, progress: bool = True
    ) -> dict[str, Any]:
        """Rules that leave the most harmful layers float, for `quantize` on a float model.

        `max_drop` takes layers away in the order of the ranking, until what is left costs at most
        that much. The cost is measured again with each set where there is an `evaluate` function
        (the drop of its score) or with the method `loss` (the increase of the loss on the
        batches); the model has to be as it was then. Otherwise it is predicted as the sum of the
        rows: with `fisher` the increase of the loss; with `sqnr` the noise of the output as a
        share of its power, so that 0.01 asks for a sum of 20 dB.

        Args:
            k: Leave this many layers float.
            max_drop: What quantization may cost, at least 0.
            progress: Show a progress bar while measuring.

        Returns:
            `{name: None}`. Other rules go in front: `{nn.Linear: FP8, **ranking.exclude(2)}`. A
            call that is quantized for the layer after it alone becomes float with that layer.

        Raises:
            RuntimeError: `max_drop` has to measure, and this ranking was loaded from a file.
            TypeError: neither or both are given, `k` is no whole number, or `max_drop` no number.
            ValueError: `k` or `max_drop` is out of range, or a score is measured that is NaN.
            Exception: whatever the model and `evaluate` or `loss` raise while measuring.
        """
        if (k is None) == (max_drop is None):
            raise TypeError("exclude takes either a number of layers k or max_drop=")
        if k is not None:
            if isinstance(k, bool) or not isinstance(k, Integral):
                raise TypeError(f"k must be a whole number of layers, got {k!r}")
            if not 0 <= k <= len(self.rows):
                raise ValueError(f"k={k} is out of range; the ranking has {len(self.rows)} rows")
            return {row.name: None for row in self.rows[: int(k)]}
        if isinstance(max_drop, bool) or not isinstance(max_drop, Real):
            raise TypeError(f"max_drop must be a number, got {max_drop!r}")
        if not max_drop >= 0:
            raise ValueError(f"max_drop={max_drop} is out of range; use 0 or more")
        # With nothing quantized the cost is 0, whatever it is that measures.
        count = 0
        while count < len(self.rows) and not self._cost(count, progress) <= max_drop:
            count += 1
        return {row.name: None for row in self.rows[:count]}

    def _cost(self, count: int, progress: bool) -> float:
        kept = self.rows[count:]
        if self._measure is not None:
            return self._measure(frozenset(row.name for row in kept), progress)
        if self.method in ("loss", "evaluate"):
            raise RuntimeError(
                "this ranking cannot measure any more, as it was loaded from a file; call "
                "sensitivity again, or exclude(k)"
            )
        if self.method == "sqnr":
            return sum(10 ** (-row.score / 10) for row in kept)
        return sum(row.score for row in kept)

    def __getstate__(self) -> dict[str, Any]:
        """Without the model and the batches."""
        return {**self.__dict__, "_measure": None}

    def __str__(self) -> str:
        def shown(score: float) -> str:
            return shown_db(score) if self.method == "sqnr" else f"{score:.4g}"

        table = [("rank", "layer", "kind", UNITS[self.method])]
        table += [
            (str(row.rank), row.name or "(model)", row.kind, shown(row.score)) for row in self.rows
        ]
        lines = aligned(table, right=1)
        ends = []
        if self.reference is not None:
            ends.append(f"in float {self.reference:.6g}")
        if self.total is not None:
            ends.append(f"all quantized: {shown(self.total)}")
        return "\n".join([*lines, *(["", ", ".join(ends)] if ends else [])])
