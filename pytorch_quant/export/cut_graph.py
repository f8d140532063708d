"""A graph cut at its Q/DQ pairs, so that every part of it can be fed torch's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pytorch_quant.export.engines import open_session
from pytorch_quant.export.ports import onnx_type, torch_dtype
from pytorch_quant.export.qdq_sites import Site, constants_of

_BEFORE_Q, _AFTER_DQ = "::before_q", "::after_dq"
# QuantizeLinear-19 brought float16; before it the exporter casts around the pair.
_HALF_SCALE_OPSET = 19


class CutGraph:
    """A copy of a model in which Q and the readers of DQ take new inputs.

    Args:
        model: An `onnx.ModelProto` with its data, without local functions.
        sites: Where to cut; weights are not cut off, only looked at.
        inputs: The tensors that the model takes, in order.
        engine: Where it is evaluated.

    Attributes:
        tensors: The values of the tensors that were asked for, by name.
        dequantized: Names of what DequantizeLinear makes at the sites.
        engine: As given.
    """

    def __init__(
        self, model: Any, sites: list[Site], inputs: dict[str, Tensor], engine: str
    ) -> None:
        self._model = type(model)()
        self._model.CopyFrom(model)
        self._feeds = dict(inputs)
        self.engine = engine
        self._constants = constants_of(model.graph)
        self._graph = self._model.graph
        del self._graph.value_info[:]
        self.dequantized = {made for site in sites for made in site.made}
        self._wanted = [output.name for output in self._graph.output]
        for site in sites:
            self._wanted += site.made
            if not site.weight:
                self._cut(site)
        given = {i.name for i in self._graph.input} | {c.name for c in self._graph.initializer}
        self._wanted = [name for name in dict.fromkeys(self._wanted) if name not in given]
        self.tensors: dict[str, Tensor] = {}

    def _cut(self, site: Site) -> None:
        dtype = self._scale_type(site) or site.call.x.dtype
        before = self._feed(f"{site.source}{_BEFORE_Q}::{site.made[0]}", site.call.x.to(dtype))
        quantizing = [n for n in self._graph.node if _makes_codes_of(n, site)]
        for node in quantizing:
            node.input[0] = before
        self._wanted.append(site.source)
        for made in site.made:
            after = self._feed(f"{made}{_AFTER_DQ}", site.call.y.to(dtype))
            for node in self._graph.node:
                _rename(node, made, after)

    def _scale_type(self, site: Site) -> torch.dtype | None:
        reader = next(n for n in self._graph.node if site.made[0] in n.output)
        for constant in self._graph.initializer:
            if constant.name == reader.input[1]:
                return torch_dtype(constant.data_type)
        opset = max(o.version for o in self._model.opset_import if o.domain in ("", "ai.onnx"))
        return torch.float32 if opset < _HALF_SCALE_OPSET else None

    def _feed(self, name: str, value: Tensor) -> str:
        import onnx

        kind = onnx_type(value.dtype)
        self._graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        self._feeds[name] = value
        return name

    def evaluate(self, more: Iterable[str] = ()) -> None:
        """Run the graph with optimizations off and keep outputs, sites and `more` in `tensors`.

        Raises:
            RuntimeError: the engine cannot load or run it.
        """
        import onnx

        del self._graph.output[:]
        wanted = list(dict.fromkeys([*self._wanted, *more]))
        self._graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        session = open_session(self._model, self.engine, optimize=False)
        found = session.run([self._feeds[port.name] for port in session.inputs])
        self.tensors = {**self._feeds, **dict(zip(wanted, found, strict=True))}

    def part(self, tensor: str) -> list[Any]:
        """The nodes between the cuts and `tensor`, in the order in which they run."""
        return upstream(self._graph, tensor, lambda name: name not in self._constants)


def upstream(graph: Any, tensor: str, follow: Callable[[str], bool] = bool) -> list[Any]:
    """The nodes that `tensor` is computed by, through inputs for which `follow` is true."""
    needed = {tensor}
    nodes = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        nodes.append(node)
        needed.update(name for name in (*node.input, *captured(node)) if name and follow(name))
    return nodes[::-1]


def captured(node: Any) -> set[str]:
    """What the bodies of If, Loop and Scan read, their own tensors included."""
    names: set[str] = set()
    for body in bodies(node):
        names |= {output.name for output in body.output}
        for inner in body.node:
            names |= set(inner.input) | captured(inner)
    return names


def bodies(node: Any) -> list[Any]:
    """The graphs in the attributes of a node."""
    return [
        body for a in node.attribute for body in (*([a.g] if a.HasField("g") else []), *a.graphs)
    ]


def _makes_codes_of(node: Any, site: Site) -> bool:
    if node.op_type not in ("QuantizeLinear", "DynamicQuantizeLinear"):
        return False
    # The DequantizeLinear of a dynamic pair bears the name; the codes tell which node it reads.
    return node.output[0] in (site.node.output[0], site.node.input[0])


def _rename(node: Any, old: str, new: str) -> None:
    for index, used in enumerate(node.input):
        if used == old:
            node.input[index] = new
    for body in bodies(node):
        for inner in body.node:
            _rename(inner, old, new)
        for output in body.output:
            if output.name == old:
                output.name = new
