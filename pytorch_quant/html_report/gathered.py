"""Everything that the page is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytorch_quant.analysis import LayerErrors, ModelSummary, Sensitivity
from pytorch_quant.analysis.ranking import LayerSensitivity
from pytorch_quant.export import Prediction
from pytorch_quant.html_report.clip_lines import Panel
from pytorch_quant.html_report.exported import Exported
from pytorch_quant.html_report.scores import WeightSizes
from pytorch_quant.placement.plan import Plan


@dataclass(frozen=True)
class Gathered:
    """What was measured.

    Attributes:
        model: The name of its class.
        versions: Of this package and of torch, in words.
        errors: Of tensors and layers.
        ranking: Layers, the most harmful first.
        panels: A histogram for each quantizer.
        table: The quantizers that the model has.
        plan: What `quantize` would do to the float model; None without one.
        exported: What its file shows.
        sizes: Of the parameters.
        accuracy: Scores by name, the float one first; empty if there are none.
        ruled: The rules of `quantize` are known.
    """

    model: str
    versions: str
    errors: LayerErrors
    ranking: Sensitivity
    panels: list[Panel]
    table: ModelSummary
    plan: Plan | None
    exported: Exported
    sizes: WeightSizes
    accuracy: dict[str, float] = field(default_factory=dict)
    ruled: bool = False


def kinds_of(prediction: Prediction) -> str:
    """`int8`, `fp8`, or both: what the operators that are not float run in."""
    return " or ".join(sorted({row.runs_in for row in prediction.rows if row.int8})) or "int8"


def ranking_of(errors: LayerErrors, holders: dict[str, tuple[str, ...]]) -> Sensitivity:
    """The ranking `sensitivity(method="sqnr")`, from passes that were run already.

    Args:
        errors: With layers.
        holders: The names of the quantizers of each layer or call.
    """
    # NaN, of an output that quantization broke, comes first.
    ordered = sorted(errors.layers, key=lambda row: (row.only_db == row.only_db, row.only_db))
    rows = [
        LayerSensitivity(row.name, row.kind, row.only_db, rank, holders[row.name])
        for rank, row in enumerate(ordered, 1)
    ]
    return Sensitivity("sqnr", rows, None, errors.output_db)
