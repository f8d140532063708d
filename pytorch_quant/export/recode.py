"""The same activation codes as int8 with zero point 0, or as uint8 with zero point 128."""

from __future__ import annotations

from dataclasses import dataclass, field
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
# They move or pick codes and compare them at most, so that they commute with adding 128. Pad and
# Resize do with some attributes.
_LAYOUT = (
    *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"),
    *("Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile"),
    *("Transpose", "Unsqueeze"),
)


def to_unsigned(graph: Any, *, for_openvino: bool = False) -> int:
    """Write symmetric int8 activation codes as uint8 with zero point 128, in place.

    `q_u = q_s + 128` with the same scale dequantizes to the same values, and QuantizeLinear adds
    the zero point behind the rounding, so that outputs are bit-identical. The integer kernels of
    x86 want unsigned activations. Constants stay signed, and so do codes that something other than
    a DequantizeLinear or a layout operator reads.

    Args:
        graph: An `onnx.GraphProto`.
        for_openvino: Leave signed what OpenVINO takes with zero points of 0 alone: inputs of
            ConvTranspose, which it runs in float otherwise, and the Q between a Concat and a
            product: where it joins along other axes than the last, OpenVINO 2026.4 cannot load it.

    Returns:
        The number of QuantizeLinear nodes whose codes changed.
    """
    import onnx

    kind = onnx.TensorProto
    return _recode(graph, (kind.INT8, 0), (kind.UINT8, 128), for_openvino)


def to_signed(graph: Any) -> int:
    """Write activation codes of uint8 with zero point 128 as int8 with zero point 0, in place.

    The reverse of `to_unsigned`, for TensorRT, which has no uint8.

    Args:
        graph: An `onnx.GraphProto`.

    Returns:
        The number of QuantizeLinear nodes whose codes changed.
    """
    import onnx

    kind = onnx.TensorProto
    return _recode(graph, (kind.UINT8, 128), (kind.INT8, 0), False)


@dataclass
class _Region:
    """Tensors that hold codes of one encoding, and the Q and DQ nodes around them."""

    tensors: list[str] = field(default_factory=list)
    quantizers: list[Any] = field(default_factory=list)
    dequantizers: list[Any] = field(default_factory=list)
    closed: bool = True


def code_inputs(node: Any) -> list[int]:
    """Which inputs of a layout operator hold what it moves; empty for other operators."""
    if is_standard(node, "Concat"):
        return list(range(len(node.input)))
    if is_standard(node, "Resize"):
        # Cropping fills what lies outside with a value of its own.
        crops = attribute(node, "coordinate_transformation_mode") == b"tf_crop_and_resize"
        return [0] if attribute(node, "mode", b"nearest") == b"nearest" and not crops else []
    if is_standard(node, "Pad"):
        return [] if attribute(node, "mode", b"constant") == b"constant" else [0]
    return [0] if is_standard(node, *_LAYOUT) else []


def _code_outputs(node: Any) -> list[str]:
    return list(node.output[:1] if is_standard(node, "MaxPool") else node.output)


def _region(wiring: Wiring, q: Any) -> _Region:
    """Everything that has to change its encoding together with `q`."""
    region = _Region()
    pending = [q.output[0]]
    while pending:
        tensor = pending.pop()
        if tensor in region.tensors:
            continue
        region.tensors.append(tensor)
        producer = wiring.producers.get(tensor)
        if tensor in wiring.outputs | wiring.captured or producer is None:
            region.closed = False
            continue
        layout = [producer]
        if is_standard(producer, _Q):
            layout = []
            region.quantizers.append(producer)
            region.closed &= producer.input[0] not in wiring.constants
        for node, index in wiring.uses(tensor):
            if is_standard(node, _DQ) and index == 0:
                region.dequantizers.append(node)
            else:
                region.closed &= index in code_inputs(node)
                layout.append(node)
        for node in layout:
            read = code_inputs(node)
            region.closed &= bool(read)
            if read:
                pending += [node.input[i] for i in read] + _code_outputs(node)
    return region


def _recode(graph: Any, old: tuple[int, int], new: tuple[int, int], for_openvino: bool) -> int:
    wiring = Wiring(graph)
    done: set[str] = set()
    found: list[_Region] = []
    for q in [n for n in graph.node if is_standard(n, _Q)]:
        if q.output[0] in done:
            continue
        region = _region(wiring, q)
        done.update(region.tensors)
        pairs = (*region.quantizers, *region.dequantizers)
        kept = for_openvino and _wants_zero(wiring, region)
        if region.closed and not kept and all(_encoded(wiring, node, *old) for node in pairs):
            found.append(region)
    nodes = [n for region in found for n in (*region.quantizers, *region.dequantizers)]
    _write_zero_points(graph, wiring, nodes, new)
    changed = {tensor for region in found for tensor in region.tensors}
    for info in graph.value_info:
        if info.name in changed:
            info.type.tensor_type.elem_type = new[0]
    return sum(len(region.quantizers) for region in found)


def _wants_zero(wiring: Wiring, region: _Region) -> bool:
    """Whether OpenVINO takes these codes with a zero point of 0 alone; see `to_unsigned`."""
    readers = [n for dq in region.dequantizers for n, _ in wiring.uses(dq.output[0])]
    if any(is_standard(node, "ConvTranspose") for node in readers):
        return True
    made = [wiring.producers.get(q.input[0]) for q in region.quantizers]
    joined = any(n is not None and is_standard(n, "Concat") for n in made)
    return joined and any(is_standard(node, "MatMul", "Gemm") for node in readers)


def _encoded(wiring: Wiring, node: Any, kind: int, zero_point: int) -> bool:
    """Whether a Q or DQ node has codes of this type and zero point."""
    if len(node.input) < 3 or not node.input[2]:
        # Without a zero point it is 0; the type is in an attribute of Q, in the codes of DQ.
        typed = is_standard(node, _DQ) or attribute(node, "output_dtype", 0) == kind
        return zero_point == 0 and typed and wiring.held(node.input[1]) is not None
    held, value = wiring.held(node.input[2]), wiring.value(node.input[2])
    return value is not None and held.data_type == kind and bool((value == zero_point).all())


def _write_zero_points(graph: Any, wiring: Wiring, nodes: list[Any], new: tuple[int, int]) -> None:
    """Give `nodes` zero points of the new encoding; those that other nodes share stay for them."""
    import onnx

    kind, code = new
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    changing = {id(node) for node in nodes}
    taken = names(graph)
    written: dict[tuple[str, tuple[int, ...]], str] = {}
    for node in nodes:
        old = node.input[2] if len(node.input) > 2 else ""
        shape = _shape(wiring, node, old)
        key = (old or node.input[1], shape)
        if key not in written:
            value = np.full(shape, code, dtype)
            own = old in wiring.initializers and old not in wiring.inputs | wiring.captured
            own = own and all(id(user) in changing and i == 2 for user, i in wiring.uses(old))
            name = old if own else free_name(_zero_point_name(node, old), taken)
            tensor = onnx.numpy_helper.from_array(value, name)
            if own:
                wiring.initializers[old].CopyFrom(tensor)
            else:
                graph.initializer.append(tensor)
            written[key] = name
        del node.input[2:]
        node.input.append(written[key])
        if attribute(node, "output_dtype") is not None and is_standard(node, _Q):
            set_attribute(node, "output_dtype", kind)
    still = {used for node in graph.node for used in node.input} | wiring.captured | wiring.inputs
    for name in {old for old, _ in written} - still - wiring.outputs:
        if name in wiring.initializers:
            graph.initializer.remove(wiring.initializers[name])
        elif name in wiring.producers:
            graph.node.remove(wiring.producers[name])


def _shape(wiring: Wiring, node: Any, zero_point: str) -> tuple[int, ...]:
    return tuple(wiring.held(zero_point or node.input[1]).dims)


def _zero_point_name(node: Any, old: str) -> str:
    """`<quantizer>.zero_point` where the scale says whose it is."""
    scale = node.input[1]
    if scale.endswith(".scale"):
        return f"{scale.removesuffix('.scale')}.zero_point"
    return f"{old or scale}_zero_point" if not old.endswith("zero_point") else old
