"""OpenVINO's CPU plugin, whose low-precision passes move DQ behind what can run on integers.

Products do where both operands come from a DQ. Poolings and joins do on the codes of the DQ in
front of them. (OpenVINO documentation, "Low precision transformations".)
"""

from __future__ import annotations

from pytorch_quant.export.lint.graph import Graph, Node
from pytorch_quant.export.lint.grids import INT8, UINT8, code_type, source_dq
from pytorch_quant.export.lint.operators import CONVOLUTIONS
from pytorch_quant.export.lint.runtimes.operands import POOLS, float_operand, tensors, zero_point


def verdict(graph: Graph, node: Node) -> tuple[bool, str]:
    """Whether the node runs on 8-bit codes, and why."""
    found = [(name, source_dq(graph, name)) for name in tensors(graph, node)]
    sources = [dq for _, dq in found if dq is not None]
    foreign = [dq for dq in sources if code_type(graph, dq) not in (INT8, UINT8, 0)]
    if foreign:
        return False, f"the codes of {foreign[0].name} have no 8 bits of integers"
    if node.op in (*CONVOLUTIONS, "Gemm", "MatMul", "Einsum"):
        missing = float_operand(graph, node)
        if missing:
            return False, missing
        if node.op == "ConvTranspose" and any(zero_point(graph, dq).any() for dq in sources):
            return False, "ConvTranspose on integers takes no zero point but 0"
        return True, "both operands come from a DQ"
    if node.op in (*POOLS, "Add", "Mul", "Concat"):
        float_inputs = [name for name, dq in found if dq is None]
        if float_inputs:
            return False, f"{float_inputs[0]} comes from no DQ"
        return True, "it reads the codes of the DQ before it"
    return False, f"OpenVINO runs {node.op} in float"
