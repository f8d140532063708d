"""One self-contained page about a quantized model."""

from pytorch_quant.html_report.report import ReportFile, report

__all__ = ["ReportFile", "report"]
