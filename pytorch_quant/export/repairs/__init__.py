"""Repairs of Q/DQ graphs that leave what they compute as it is; `fix_onnx` runs them in order."""
