"""The demonstration: handwritten digits from float to a verified int8 file."""

from pytorch_quant.demo.flow import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
