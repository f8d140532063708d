"""What every Q and DQ node should say: its domain, its axis, its zero point."""

from __future__ import annotations

from typing import Any

import numpy as np

from pytorch_quant.export.wiring import (
    Wiring,
    attribute,
    free_name,
    is_standard,
    names,
    set_attribute,
)

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
# The domain in which ONNX Runtime had them first, for types that ONNX did not have then.
_RUNTIME_DOMAIN = "com.microsoft"
_PER_CHANNEL_OPSET = 13


def use_standard_domain(graph: Any, opset: int) -> int:
    """Make 8-bit Q and DQ nodes of ONNX Runtime's domain the operators of ONNX, which are equal.

    `quantize_static` writes them with its option `UseQDQContribOps`.
    """
    wiring = Wiring(graph)
    changed = 0
    for node in graph.node:
        if node.op_type not in (_Q, _DQ) or node.domain != _RUNTIME_DOMAIN:
            continue
        typed = wiring.held(node.input[2]) if len(node.input) > 2 else None
        if typed is None and node.op_type == _DQ:
            typed = wiring.held(node.input[0])
        if typed is None or not _standard_type(typed) or opset < _PER_CHANNEL_OPSET:
            continue
        node.domain = ""
        changed += 1
    return changed


def _standard_type(held: Any) -> bool:
    import onnx

    kind = onnx.TensorProto
    return held.data_type in (kind.INT8, kind.UINT8, kind.INT32)


def write_axes(graph: Any, opset: int) -> int:
    """Write the axis of per-channel nodes that leave it to the default of ONNX, which is 1.

    TensorRT's parser has defaults of its own, by operator set.
    """
    wiring = Wiring(graph)
    changed = 0
    for node in graph.node:
        if not is_standard(node, _Q, _DQ) or opset < _PER_CHANNEL_OPSET:
            continue
        scale = wiring.held(node.input[1])
        channels = scale is not None and len(scale.dims) == 1 and scale.dims[0] > 1
        if channels and attribute(node, "axis") is None:
            set_attribute(node, "axis", 1)
            changed += 1
    return changed


def write_zero_points(graph: Any) -> int:
    """Write the zero points that are left out, as the zeros of the type that ONNX means.

    For Q that is uint8, where no `output_dtype` says otherwise; TensorRT takes it for int8. For DQ
    it is the type of the codes.
    """
    wiring, taken = Wiring(graph), names(graph)
    written: dict[tuple[str, int], str] = {}
    absent = [
        (node, _code_type(wiring, node))
        for node in graph.node
        if is_standard(node, _Q, _DQ)
        and (len(node.input) < 3 or not node.input[2])
        and wiring.held(node.input[1]) is not None
    ]
    changed = 0
    for node, kind in absent:
        if kind is None:
            continue
        scale = node.input[1]
        if (scale, kind) not in written:
            name = f"{scale.removesuffix('.scale').removesuffix('_scale')}.zero_point"
            name = written[scale, kind] = free_name(name, taken)
            graph.initializer.append(_zeros(name, wiring.held(scale).dims, kind))
        del node.input[2:]
        node.input.append(written[scale, kind])
        changed += 1
    return changed


def _code_type(wiring: Wiring, node: Any) -> int | None:
    """The type of the codes of a node without a zero point; None if unknown."""
    import onnx

    if is_standard(node, _Q):
        return int(attribute(node, "output_dtype", 0)) or int(onnx.TensorProto.UINT8)
    held = wiring.held(node.input[0])
    if held is not None:
        return int(held.data_type)
    source = wiring.producers.get(node.input[0])
    if source is None or not is_standard(source, _Q):
        return None
    zero_point = wiring.held(source.input[2]) if len(source.input) > 2 else None
    if zero_point is not None:
        return int(zero_point.data_type)
    return None if len(source.input) > 2 and source.input[2] else _code_type(wiring, source)


def _zeros(name: str, dims: Any, kind: int) -> Any:
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return onnx.numpy_helper.from_array(np.zeros(list(dims), np.float32).astype(dtype), name)
