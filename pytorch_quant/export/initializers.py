"""Constants of a Q/DQ graph: integer weights, and names that say whose scale it is."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytorch_quant.fake_quant import quantize_to_codes
from pytorch_quant.formats import FloatFormat, Format, IntFormat

_SCOPES = "pkg.torch.onnx.name_scopes"
# What may stand between a weight and the product that reads it.
_ON_WEIGHTS = ("DequantizeLinear", "QuantizeLinear", "Max", "Min", "Clip", "Transpose")


def store_integer_weights(graph: Any) -> int:
    """Replace each constant that goes through Q and DQ by its codes and the DQ, in place.

    Args:
        graph: An `onnx.GraphProto`.

    Returns:
        The number of constants replaced.
    """
    import onnx

    constants = {c.name: c for c in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    replaced: dict[str, str] = {}
    taken = set(constants)
    for node in [n for n in graph.node if n.op_type == "QuantizeLinear"]:
        weight = _constant(node.input[0], constants, producers)
        if weight is None or node.input[1] not in constants:
            continue
        scale = _to_torch(constants[node.input[1]])
        zero_point = constants[node.input[2]]
        codes = _codes(weight, scale, _axis(node), zero_point.data_type)
        name = _free(f"{_root(node.input[0], producers)}_quantized", taken)
        graph.initializer.append(
            onnx.helper.make_tensor(
                name, zero_point.data_type, weight.shape, codes.numpy().tobytes(), raw=True
            )
        )
        replaced[node.output[0]] = name
        graph.node.remove(node)
    for user in graph.node:
        for i, used in enumerate(user.input):
            user.input[i] = replaced.get(used, used)
    stored = len(replaced)
    drop_unused(graph)
    return stored


def name_after_modules(graph: Any) -> None:
    """Name nodes after the module they come from, and each quantizer's constants after it."""
    taken = {c.name for c in graph.initializer}
    constants = {c.name: c for c in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    renamed: dict[tuple[str, str], str] = {}
    for node in graph.node:
        module = _module_of(node) or _owner_of_weight(node, producers)
        if module is None:
            continue
        node.name = _free(f"{module}/{node.op_type}", taken)
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for i, role in zip((1, 2), ("scale", "zero_point"), strict=True):
            used = node.input[i] if i < len(node.input) else ""
            if used not in constants:
                continue
            # The exporter lets quantizers share equal constants; who edits one means one.
            if (used, module) not in renamed:
                name = renamed[used, module] = _free(f"{module}.{role}", taken)
                graph.initializer.add().CopyFrom(constants[used])
                graph.initializer[-1].name = name
            node.input[i] = renamed[used, module]
    drop_unused(graph)


def drop_traces(graph: Any) -> None:
    """Drop the exporter's stack traces: they name local files and outweigh small graphs."""
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
    graph.ClearField("metadata_props")


def _constant(name: str, constants: dict[str, Any], producers: dict[str, Any]) -> Tensor | None:
    """The value of a constant, seen through the clip that stands before a narrow grid."""
    if name in constants:
        return _to_torch(constants[name])
    node = producers.get(name)
    if node is None or node.op_type not in ("Max", "Min", "Clip"):
        return None
    given = [_constant(used, constants, producers) for used in node.input]
    if any(value is None for value in given):
        return None
    x, *bounds = (value for value in given if value is not None)
    if node.op_type == "Clip":
        return torch.minimum(torch.maximum(x, bounds[0]), bounds[1]) if len(bounds) == 2 else None
    return (torch.maximum if node.op_type == "Max" else torch.minimum)(x, bounds[0])


def clipped_constant(name: str, constants: dict[str, Any], producers: dict[str, Any]) -> Any:
    """What stands behind the clip before a narrow grid, as an `onnx.TensorProto`, or None."""
    import onnx

    value = _constant(name, constants, producers)
    if value is None:
        return None
    kind = constants[_root(name, producers)].data_type
    raw = np.asarray(value.contiguous().reshape(-1).view(torch.uint8)).tobytes()
    return onnx.TensorProto(data_type=kind, dims=list(value.shape), raw_data=raw)


def _to_torch(constant: Any) -> Tensor:
    import onnx

    if constant.data_type == onnx.TensorProto.BFLOAT16:
        # NumPy has no bfloat16 of its own; its bits are the upper half of a float32.
        bits = onnx.numpy_helper.to_array(constant).view(np.uint16).astype(np.uint32) << 16
        return torch.from_numpy(np.array(bits.view(np.float32))).bfloat16()
    return torch.from_numpy(np.array(onnx.numpy_helper.to_array(constant)))


def _root(name: str, producers: dict[str, Any]) -> str:
    while name in producers:
        name = producers[name].input[0]
    return name


def _codes(weight: Tensor, scale: Tensor, axis: int, data_type: int) -> Tensor:
    fmt = _format(data_type)
    if scale.dim():
        scale = scale.reshape([-1 if a == axis % weight.dim() else 1 for a in range(weight.dim())])
    codes = quantize_to_codes(weight, scale.float(), fmt)
    return codes.to(fmt.storage).contiguous().view(torch.uint8)


def _format(data_type: int) -> Format:
    import onnx

    formats: dict[int, Format] = {
        onnx.TensorProto.INT8: IntFormat(8),
        onnx.TensorProto.UINT8: IntFormat(8, signed=False),
        onnx.TensorProto.FLOAT8E4M3FN: FloatFormat(4, 3),
    }
    return formats[data_type]


def _axis(node: Any) -> int:
    return next((a.i for a in node.attribute if a.name == "axis"), 1)


def _module_of(node: Any) -> str | None:
    scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), None)
    if scopes is None:
        return _module_in_name(node.name)
    try:
        path = [scope for scope in ast.literal_eval(scopes) if scope]
    except (SyntaxError, ValueError):
        return None
    # The last scope is the node itself, those before it the modules from the outside in.
    return path[-2] if len(path) > 1 else None


def _owner_of_weight(node: Any, producers: dict[str, Any]) -> str | None:
    """The module whose weight a node reads; the exporter loses scopes behind a framed forward."""
    if len(node.input) < 2 or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    name = node.input[1]
    while name in producers and producers[name].op_type in _ON_WEIGHTS:
        name = producers[name].input[0]
    owner, found, _ = name.rpartition(".weight")
    return owner if found and name not in producers else None


def _module_in_name(name: str) -> str | None:
    """The module of a node that the TorchScript exporter named, as `/layer1/layer1.0/conv/Conv`."""
    if not name.startswith("/"):
        return None
    parts: list[str] = []
    for part in name.split("/")[1:-1]:
        # A child of a Sequential repeats the name of its parent.
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts) or None


def _free(name: str, taken: set[str]) -> str:
    candidate, k = name, 1
    while candidate in taken:
        candidate, k = f"{name}_{k}", k + 1
    taken.add(candidate)
    return candidate


def _used_by(node: Any) -> set[str]:
    """The names that a node reads, those in the bodies of If and Loop included."""
    used = set(node.input)
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            used |= {output.name for output in body.output}
            for inner in body.node:
                used |= _used_by(inner)
    return used


def drop_unused(graph: Any) -> None:
    """Drop nodes and constants that lead to no output of the graph, in place."""
    kept = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if any(output in kept for output in node.output):
            nodes.append(node)
            kept.update(_used_by(node))
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    constants = [c for c in graph.initializer if c.name in kept]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    produced = {o for node in graph.node for o in node.output} | {c.name for c in constants}
    infos = [i for i in graph.value_info if i.name in produced]
    del graph.value_info[:]
    graph.value_info.extend(infos)
