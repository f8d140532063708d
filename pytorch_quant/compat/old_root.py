"""What stands directly in `pytorch_quantization`, apart from its modules."""

from pytorch_quant.compat.export_mode import enable_onnx_export
from pytorch_quant.compat.old_version import __version__

__all__ = ["__version__", "enable_onnx_export"]
