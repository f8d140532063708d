"""Export of quantized models to ONNX."""

from pytorch_quant.export.onnx import ExportReport, export_onnx

__all__ = ["ExportReport", "export_onnx"]
