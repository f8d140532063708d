"""What `quantize` did, as text and as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_quant.analysis.plain_data import plain
from pytorch_quant.commands.lint import counts, has_errors, told
from pytorch_quant.export import ExportReport, Prediction, VerifyReport
from pytorch_quant.export.lint import Finding
from pytorch_quant.files import written_aside
from pytorch_quant.placement.plan import LeftFloat
from pytorch_quant.ptq import CalibrationReport
from pytorch_quant.tables import aligned


@dataclass(frozen=True)
class QuantizeReport:
    """One run of the command.

    Attributes:
        settings: What was asked for.
        files: What was written, by role.
        accuracy: Top-1 in percent of the float and the quantized model; empty if not measured.
        left: What stays float although it could be quantized.
        calibration: The ranges.
        exported: What the ONNX file holds.
        findings: Of `lint_onnx` on it.
        prediction: Of `predict_int8` on it.
        verified: Of `verify_onnx`; None if not asked for.
    """

    settings: dict[str, Any]
    files: dict[str, Path]
    accuracy: dict[str, float]
    left: list[LeftFloat]
    calibration: CalibrationReport
    exported: ExportReport
    findings: list[Finding]
    prediction: Prediction
    verified: VerifyReport | None

    @property
    def ok(self) -> bool:
        """Whether the file has no errors, and is what torch computes where that was checked."""
        return not has_errors(self.findings) and (self.verified is None or self.verified.ok)

    def as_dict(self) -> dict[str, Any]:
        """As plain data; ranges per channel as their least and largest amax."""
        return {
            "ok": self.ok,
            "settings": plain(self.settings),
            "files": plain(self.files),
            "accuracy": self.accuracy,
            "left_float": plain(self.left),
            "calibration": calibration_data(self.calibration),
            "export": plain(self.exported),
            "lint": {"counts": counts(self.findings), "findings": plain(self.findings)},
            "prediction": {**plain(self.prediction), "share": self.prediction.share},
            "verify": verify_data(self.verified),
        }

    def short(self) -> str:
        """The outcome, for the terminal."""
        lines = [f"{name:<12}{path}" for name, path in self.files.items()]
        lines += [f"{'report':<12}{self.files['onnx'].parent / 'report.txt'}", ""]
        if self.accuracy:
            lines += [f"top-1 %     {self._top1()}"]
        lines += [str(self.exported)]
        lines += [str(self.prediction).rpartition("\n")[2], f"lint: {told(self.findings)}"]
        lines += [str(finding) for finding in self.findings if finding.severity == "error"]
        if self.verified is not None:
            lines += ["", str(self.verified)]
        return "\n".join(lines)

    def full(self) -> str:
        """Everything, for `report.txt`."""
        parts = [
            "\n".join(aligned([(name, str(value)) for name, value in self.settings.items()])),
            self.short(),
        ]
        if self.left:
            rows = [(entry.site or "(model)", entry.op, entry.reason) for entry in self.left]
            parts.append("\n".join(["left float", *aligned([("site", "kind", "why"), *rows])]))
        parts += [str(self.calibration), str(self.prediction)]
        parts += ["\n".join(["lint", *map(str, self.findings)])] if self.findings else []
        return "\n\n".join(parts)

    def _top1(self) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in self.accuracy.items())


def write_reports(report: QuantizeReport, folder: Path) -> None:
    """Write `report.txt` and `report.json`, each whole or not at all."""
    contents = {
        "report.txt": report.full(),
        "report.json": json.dumps(report.as_dict(), indent=2, allow_nan=False),
    }
    for name, content in contents.items():
        with written_aside(folder / name) as aside:
            aside.write_text(f"{content}\n", encoding="utf-8")


def calibration_data(report: CalibrationReport) -> dict[str, Any]:
    """A calibration as plain data; ranges per channel as their least and largest amax."""
    ranges = []
    for row in report.ranges:
        amax = None if row.amax is None else [float(row.amax.min()), float(row.amax.max())]
        count = None if row.amax is None else row.amax.numel()
        rest = {"seen": row.seen, "clipped": row.clipped}
        ranges.append(
            {"name": row.name, "method": row.method, "amax": amax, "amax_count": count, **rest}
        )
    return {"batches": report.batches, "unreached": report.unreached, "ranges": plain(ranges)}


def verify_data(report: VerifyReport | None) -> Any:
    """A verification as plain data, with its verdict."""
    return None if report is None else {"ok": report.ok, **plain(report)}
