"""`pytorch_quantization.version`: the version whose interface this package serves."""

__version__ = "2.2.1"
