"""Weights quantized in blocks: stored as packed integers, and along the axis that runtimes read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pytorch_quant.export.wiring import (
    Wiring,
    attribute,
    free_name,
    is_standard,
    names,
    read_instead,
    set_attribute,
)
from pytorch_quant.fake_quant import quantize_to_codes
from pytorch_quant.formats import FloatFormat, Format, IntFormat

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"


def store_blocks(graph: Any, *, integers: bool = True) -> int:
    """Bring weights with a `block_size` into the form that runtimes take, in place.

    A Transpose between the DequantizeLinear and its MatMul is applied to the weight, so that the
    blocked axis moves with it (rule W2). Float weights are replaced by their codes.

    Args:
        graph: An `onnx.GraphProto` whose weights are float initializers under Q/DQ pairs.
        integers: Store codes and a DequantizeLinear; if false, leave float weights and the pair.

    Returns:
        The number of weights stored as integers.
    """
    stored = 0
    taken = names(graph)
    for quantize in [n for n in graph.node if is_standard(n, _Q) and attribute(n, "block_size")]:
        wiring = Wiring(graph)
        weight = _weight(wiring, quantize.input[0])
        given = [wiring.value(used) for used in quantize.input[1:]]
        if weight is None or len(given) != 2 or any(value is None for value in given):
            continue
        readers = [node for node, _ in wiring.uses(quantize.output[0])]
        if not all(is_standard(node, _DQ) for node in readers):
            continue
        flip = all(_only_transposed(wiring, node.output[0]) for node in readers)
        held = [wiring.held(used) for used in quantize.input[1:]]
        axis, size = attribute(quantize, "axis") % weight.ndim, attribute(quantize, "block_size")
        if flip:
            weight, axis = np.ascontiguousarray(weight.T), 1 - axis
            held = [_transposed(tensor) for tensor in held]
            for node in readers:
                _skip_transposes(graph, wiring, node.output[0])
            _forget_shapes(graph, {quantize.output[0], *(node.output[0] for node in readers)})
        root = _root(wiring, quantize.input[0])
        new = [free_name(f"{root}.{role}", taken) for role in ("scale", "zero_point")]
        for tensor, name in zip(held, new, strict=True):
            _add(graph, tensor, name)
        for node in (quantize, *readers):
            node.input[1:] = new
            set_attribute(node, "axis", axis)
        if integers:
            scale = np.repeat(_float(held[0]), size, axis)
            codes = _codes(weight, scale, held[1].data_type)
            name = free_name(f"{root}_quantized", taken)
            _add(graph, packed(codes, held[1].data_type), name)
            for node in readers:
                node.input[0] = name
            graph.node.remove(quantize)
            stored += 1
        elif flip:
            # The values as they are in the file, behind the clip of a narrow grid if there is one.
            name = free_name(f"{root}_transposed", taken)
            _add(graph, _like(wiring, root, weight), name)
            quantize.input[0] = name
        _drop_unread(graph)
    return stored


def packed(codes: np.ndarray, data_type: int) -> Any:
    """Codes as an `onnx.TensorProto`; of 4-bit types two to a byte, the low nibble first.

    Args:
        codes: Integers of any dtype, or FP8 bytes.
        data_type: A value of `onnx.TensorProto.DataType`.
    """
    import onnx

    flat: np.ndarray = codes.reshape(-1).astype(np.int64).astype(np.uint8)
    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        nibbles = np.append(flat, np.zeros(flat.size % 2, np.uint8)) & 0xF
        flat = nibbles[::2] | nibbles[1::2] << 4
    return onnx.TensorProto(data_type=data_type, dims=codes.shape, raw_data=flat.tobytes())


def _codes(weight: np.ndarray, scale: np.ndarray, data_type: int) -> np.ndarray:
    import onnx

    kinds = onnx.TensorProto
    formats: dict[int, Format] = {
        kinds.INT4: IntFormat(4),
        kinds.UINT4: IntFormat(4, signed=False),
        kinds.INT8: IntFormat(8),
        kinds.UINT8: IntFormat(8, signed=False),
        kinds.FLOAT8E4M3FN: FloatFormat(4, 3),
    }
    fmt = formats[data_type]
    values = torch.from_numpy(weight.astype(np.float32))
    codes = quantize_to_codes(values, torch.from_numpy(scale), fmt)
    if isinstance(fmt, FloatFormat):
        return codes.to(fmt.storage).view(torch.uint8).numpy()
    return codes.to(fmt.storage).numpy()


def _weight(wiring: Wiring, name: str) -> np.ndarray | None:
    """The value of a weight, seen through the clip that stands before a narrow grid."""
    value = wiring.value(name)
    node = wiring.producers.get(name)
    if value is not None:
        # NumPy lacks bfloat16, whose values float32 holds.
        return value if value.dtype in (np.float32, np.float16) else value.astype(np.float32)
    if node is None or not is_standard(node, "Max", "Min") or len(node.input) != 2:
        return None
    first, second = (_weight(wiring, used) for used in node.input)
    if first is None or second is None:
        return None
    return (np.maximum if node.op_type == "Max" else np.minimum)(first, second)


def _root(wiring: Wiring, name: str) -> str:
    while name not in wiring.initializers and name in wiring.producers:
        name = next(u for u in wiring.producers[name].input if u in wiring.constants)
    return name


def _float(tensor: Any) -> np.ndarray:
    import onnx

    return np.asarray(onnx.numpy_helper.to_array(tensor)).astype(np.float32)


def _like(wiring: Wiring, root: str, value: np.ndarray) -> Any:
    import onnx

    kind = wiring.initializers[root].data_type
    if kind == onnx.TensorProto.BFLOAT16:
        return onnx.helper.make_tensor("", kind, value.shape, value.reshape(-1))
    return onnx.numpy_helper.from_array(np.ascontiguousarray(value))


def _transposed(tensor: Any) -> Any:
    """A scale or zero point with its two axes exchanged."""
    import onnx

    value = np.asarray(onnx.numpy_helper.to_array(tensor)).T
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return packed(value, tensor.data_type)
    if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN:
        return packed(value.astype(np.float32).astype(np.int64), tensor.data_type)
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        return onnx.helper.make_tensor("", tensor.data_type, value.shape, value.reshape(-1))
    return onnx.numpy_helper.from_array(np.ascontiguousarray(value))


def _add(graph: Any, tensor: Any, name: str) -> None:
    stored = graph.initializer.add()
    stored.CopyFrom(tensor)
    stored.name = name


def _only_transposed(wiring: Wiring, tensor: str) -> bool:
    uses = wiring.uses(tensor)
    kept = tensor in wiring.outputs | wiring.captured
    return bool(uses) and not kept and all(_is_flip(node) for node, _ in uses)


def _is_flip(node: Any) -> bool:
    return is_standard(node, "Transpose") and list(attribute(node, "perm", [])) == [1, 0]


def _skip_transposes(graph: Any, wiring: Wiring, tensor: str) -> None:
    flips = [node for node, _ in wiring.uses(tensor)]
    read_instead(graph, {node.output[0]: tensor for node in flips})
    for node in flips:
        graph.node.remove(node)


def _forget_shapes(graph: Any, tensors: set[str]) -> None:
    for info in [i for i in graph.value_info if i.name in tensors]:
        graph.value_info.remove(info)


def _drop_unread(graph: Any) -> None:
    """Drop constants, and clips of them, that nothing reads any more."""
    while True:
        wiring = Wiring(graph)
        read = set(wiring.readers) | wiring.captured | wiring.outputs
        nodes = [n for n in graph.node if is_standard(n, "Max", "Min") and n.output[0] not in read]
        for node in nodes:
            graph.node.remove(node)
        if not nodes:
            break
    for constant in [c for c in graph.initializer if c.name not in read | wiring.inputs]:
        graph.initializer.remove(constant)
    made = read | {o for node in graph.node for o in node.output}
    _forget_shapes(graph, {i.name for i in graph.value_info} - made)
