"""Which quantizer of a model each Q/DQ pair of a file stands for."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pytorch_quant.export.simulation import QuantizerCall, Simulation
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

_NODE_NAME = re.compile(r"(.*)/(?:DynamicQuantize|Quantize|Dequantize)Linear(?:_\d+)?")
_NUMBER = re.compile(r"_\d+$")
_SCOPES = "pkg.torch.onnx.name_scopes"
_CALL = re.compile(r"(?:(.*)\.)?_call_quantizers\.(.+?)_(\d+)(?:_.*)?")


@dataclass(frozen=True)
class Site:
    """A quantized tensor of a graph.

    Attributes:
        name: Qualified name of the quantizer.
        node: The node that quantizes; the DequantizeLinear of stored codes.
        source: The tensor that is quantized; `""` for stored codes.
        made: What DequantizeLinear makes of it, once for each such node.
        weight: Whether it is a constant.
        call: What torch's quantizer did.
    """

    name: str
    node: Any
    source: str
    made: list[str]
    weight: bool
    call: QuantizerCall


def layer_of(quantizer: str) -> str:
    """The layer or call that a quantizer belongs to: `conv1`, or `block/add#0`."""
    call = _CALL.fullmatch(quantizer)
    if call is not None:
        path, op, number = call.groups()
        return f"{path or ''}/{op}#{number}".lstrip("/")
    path, _, last = quantizer.rpartition(".")
    return path if last.startswith("_") else quantizer


def find_sites(
    graph: Any, model: nn.Module, simulation: Simulation
) -> tuple[list[Site], list[str]]:
    """Match the Q/DQ pairs of a graph with the quantizers of a model.

    Nodes are named after their quantizer by `export_onnx`, and carry its name in their metadata or
    as a path after a plain `torch.onnx.export`. Pairs that a quantizer makes in several calls are
    taken in order; calls on equal tensors may have been merged into one pair.

    Args:
        graph: An `onnx.GraphProto`.
        model: The model.
        simulation: What its quantizers saw.

    Returns:
        The sites in the order of the graph, and the names of nodes and quantizers without a
        counterpart.
    """
    quantizers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TensorQuantizer)
    }
    first_name = {module: name for name, module in reversed(quantizers.items())}
    groups: dict[tuple[TensorQuantizer, bool], list[_Pair]] = {}
    nameless: list[_Pair] = []
    pairs = _pairs(graph)
    for pair in pairs:
        name = _quantizer_of(pair.node, quantizers)
        if name is None:
            nameless.append(pair)
        else:
            groups.setdefault((quantizers[name], pair.weight), []).append(replace(pair, name=name))
    if nameless:
        # The TorchScript exporter calls a shared module by the path of whoever calls it, so that
        # the other names cannot be trusted either; but it merges nothing.
        nameless = pairs
        groups = {}
    sites: list[Site] = []
    used: list[QuantizerCall] = []
    for (quantizer, _), found in groups.items():
        others = [c for q, calls in simulation.quantizers.items() if q != quantizer for c in calls]
        calls = _fitting(simulation.quantizers.get(quantizer, []), len(found), others)
        if calls is None:
            nameless += found
            continue
        sites += [pair.matched(call) for pair, call in zip(found, calls, strict=True)]
        used += calls
    unused = [
        (call, first_name[quantizer])
        for quantizer, calls in simulation.quantizers.items()
        for call in calls
        if quantizer in first_name and call not in used
    ]
    free = sorted(unused, key=lambda item: item[0].order)
    scales = _scales(graph)
    unmatched = []
    for pair in nameless:
        fits = [item for item in free if _is_of(pair, item[0], scales)]
        if fits:
            sites.append(replace(pair, name=fits[0][1]).matched(fits[0][0]))
            free.remove(fits[0])
        else:
            unmatched.append(f"node {pair.node.name or pair.made[0]}")
    used += [site.call for site in sites]
    missing = (n for call, n in free if not any(_same(call, other) for other in used))
    unmatched += dict.fromkeys(f"quantizer {name}" for name in missing)
    order = {id(node): index for index, node in enumerate(graph.node)}
    return sorted(sites, key=lambda site: order[id(site.node)]), unmatched


@dataclass(frozen=True)
class _Pair:
    node: Any
    source: str
    made: list[str]
    weight: bool
    name: str = ""

    def matched(self, call: QuantizerCall) -> Site:
        return Site(self.name, self.node, self.source, self.made, self.weight, call)


def constants_of(graph: Any) -> set[str]:
    """Names of the tensors that are stored, or computed from stored ones alone."""
    found = {c.name for c in graph.initializer}
    for node in graph.node:
        given = [name for name in node.input if name]
        if node.op_type == "Constant" or (given and found.issuperset(given)):
            found.update(node.output)
    return found


def _pairs(graph: Any) -> list[_Pair]:
    constants = constants_of(graph)
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for used in node.input:
            readers.setdefault(used, []).append(node)
    outputs = {output.name for output in graph.output}
    pairs: dict[str, _Pair] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        codes, made = node.input[0], node.output[0]
        maker = producers.get(codes)
        if made in constants:
            pairs[made] = _Pair(node, "", [made], True)
        elif maker is not None and maker.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            dequantized = all(r.op_type == "DequantizeLinear" for r in readers[codes])
            # Whoever computes with the codes themselves cannot be fed real numbers.
            if dequantized and codes not in outputs:
                named = maker if maker.op_type == "QuantizeLinear" else node
                pair = pairs.setdefault(codes, _Pair(named, maker.input[0], [], False))
                pair.made.append(made)
    return list(pairs.values())


def _quantizer_of(node: Any, quantizers: dict[str, TensorQuantizer]) -> str | None:
    found = _NODE_NAME.fullmatch(node.name)
    if found is not None:
        path = _module_path(found.group(1))
        # The TorchScript exporter numbers further calls of one module.
        for called in (path, _NUMBER.sub("", path)):
            if called in quantizers:
                return called
    scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
    try:
        path = ([scope for scope in ast.literal_eval(scopes) if scope] or [""])[-2:][0]
    except (SyntaxError, ValueError):
        return None
    return path if path in quantizers else None


def _module_path(scope: str) -> str:
    """`/layer1/layer1.0/conv1`, as the TorchScript exporter writes it, as `layer1.0.conv1`."""
    if not scope.startswith("/"):
        return scope
    path = ""
    for part in scope[1:].split("/"):
        path = part if not path or part.startswith(f"{path}.") else f"{path}.{part}"
    return path


def _fitting(
    calls: list[QuantizerCall], count: int, others: list[QuantizerCall]
) -> list[QuantizerCall] | None:
    """`count` of the calls: all, or without those that an export merges; None if that fails."""
    if len(calls) == count:
        return calls
    distinct: list[QuantizerCall] = []
    for call in calls:
        if not any(_same(call, other) for other in distinct):
            distinct.append(call)
    if len(distinct) == count:
        return distinct
    own = [call for call in distinct if not any(_same(call, other) for other in others)]
    return own if len(own) == count else None


def _scales(graph: Any) -> dict[str, np.ndarray]:
    """The small float constants of a graph."""
    import onnx

    held = {c.name: c for c in graph.initializer}
    held |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return {n: onnx.numpy_helper.to_array(c) for n, c in held.items() if c.data_type in kinds}


def _is_of(pair: _Pair, call: QuantizerCall, scales: dict[str, np.ndarray]) -> bool:
    """Whether a pair without a name may be a call: its scale is that of the call."""
    found = scales.get(pair.node.input[1]) if len(pair.node.input) > 1 else None
    if found is None or call.scale is None:
        return False
    expected = call.scale.flatten().numpy()
    # A channel of zeros has any scale.
    return found.size == expected.size and bool(
        np.all((expected == 0) | np.isclose(found.flatten(), expected, rtol=1e-3, atol=0))
    )


def _same(a: QuantizerCall, b: QuantizerCall) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
