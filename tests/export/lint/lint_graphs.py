"""Small Q/DQ graphs, written node by node."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from pytorch_quant.export.lint import lint_onnx

INT8, E4M3, INT4, E2M1 = (
    TensorProto.INT8,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.INT4,
    TensorProto.FLOAT4E2M1,
)


class Build:
    """Adds nodes one by one; each method returns the name of the tensor it makes."""

    def __init__(self, opset=20, ir_version=10, dtype=TensorProto.FLOAT):
        self.opset, self.ir_version, self.dtype = opset, ir_version, dtype
        self.nodes, self.constants, self.inputs, self.domains = [], [], [], set()
        self.rng = np.random.default_rng(0)

    def input(self, name="x", shape=(1, 16, 8, 8), dtype=None):
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, shape))
        return name

    def constant(self, name, value, kind=None):
        value = np.asarray(value)
        if kind is None:
            self.constants.append(onnx.numpy_helper.from_array(value, name))
        else:
            flat = value.astype(float).reshape(-1).tolist()
            self.constants.append(helper.make_tensor(name, kind, value.shape, flat))
        return name

    def node(self, op, inputs, name, outputs=1, domain="", **attributes):
        self.domains.add(domain)
        names = [f"{name}_out{i or ''}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(op, inputs, names, name=name, domain=domain, **attributes)
        )
        return names[0] if outputs == 1 else names

    def scale(self, name, scale, kind, dtype=None):
        scale = np.asarray(scale, np.float32)
        self.constant(f"{name}.scale", scale, dtype or self.dtype)
        self.constant(f"{name}.zero", np.zeros(scale.shape), kind)
        return [f"{name}.scale", f"{name}.zero"]

    def q(self, tensor, name, scale=0.1, kind=INT8, **attributes):
        inputs = [tensor, *self.scale(name, scale, kind)]
        return self.node("QuantizeLinear", inputs, f"{name}/Q", **attributes)

    def dq(self, codes, name, **attributes):
        inputs = [codes, f"{name}.scale", f"{name}.zero"]
        return self.node("DequantizeLinear", inputs, f"{name}/DQ", **attributes)

    def qdq(self, tensor, name, scale=0.1, kind=INT8, **attributes):
        return self.dq(self.q(tensor, name, scale, kind, **attributes), name, **attributes)

    def weight(self, name, shape, axis=0, kind=INT8, scale=None, **attributes):
        """Stored codes and their DQ; `axis` None is per tensor."""
        if scale is None:
            scale = 0.01 if axis is None else np.full(shape[axis], 0.01)
        self.scale(name, scale, kind)
        self.constant(f"{name}.codes", self.rng.integers(-7, 8, shape), kind)
        if axis is not None:
            attributes["axis"] = axis
        return self.dq(f"{name}.codes", name, **attributes)

    def floats(self, name, shape):
        return self.constant(name, self.rng.normal(size=shape).astype(np.float32), self.dtype)

    def conv(self, tensor, name, cin=16, cout=16, size=3, kind=INT8, axis=0, **attributes):
        """A quantized convolution; the input is quantized by the caller."""
        group = attributes.get("group", 1)
        kernel = (size, size) if isinstance(size, int) else size
        w = self.weight(f"{name}.w", (cout, cin // group, *kernel), axis, kind)
        pads = [k // 2 for k in kernel] * 2
        return self.node("Conv", [tensor, w], name, pads=pads, **attributes)

    def batchnorm(self, tensor, name, channels=16):
        ones = self.constant(f"{name}.ones", np.ones(channels, np.float32))
        return self.node("BatchNormalization", [tensor, ones, ones, ones, ones], name)

    def model(self, *outputs, dtype=None):
        infos = [helper.make_tensor_value_info(o, dtype or self.dtype, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, infos, self.constants)
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(self.domains - {""})]
        return helper.make_model(graph, opset_imports=imports, ir_version=self.ir_version)


def found(model, target="tensorrt"):
    """`(rule, severity, node)` of each finding; rules X have `test_lint_cpu.py` to themselves."""
    findings = [f for f in lint_onnx(model, target) if f.rule[0] != "X"]
    return [(f.rule, f.severity, f.node) for f in findings]
