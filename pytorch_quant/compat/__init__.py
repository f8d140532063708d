"""Existing programs written for NVIDIA's `pytorch_quantization`, run unchanged."""

from pytorch_quant.compat.alias import install_as_pytorch_quantization
from pytorch_quant.compat.checkpoints import load_checkpoint
from pytorch_quant.compat.export_mode import enable_onnx_export

__all__ = ["enable_onnx_export", "install_as_pytorch_quantization", "load_checkpoint"]
