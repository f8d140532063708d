"""An ONNX graph as rules look at it: producers, consumers, constants, shapes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pytorch_quant.einsum import MatrixProduct, matrix_product
from pytorch_quant.export.lint.operators import QDQ
from pytorch_quant.export.saving import read_model

_LARGE = 1024


class Node:
    """A node with its attributes as a mapping.

    Attributes:
        op: Its type.
        domain: `""` for the standard operators.
        name: Its name; the type and first output where it has none.
        inputs: Names of tensors; `""` for an optional one that is left out.
        outputs: Names of tensors.
        attrs: Attribute values.
    """

    def __init__(self, proto: Any) -> None:
        import onnx

        self.op: str = proto.op_type
        self.domain: str = "" if proto.domain == "ai.onnx" else proto.domain
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        self.name: str = (
            proto.name or f"{self.op} {self.outputs[0] if self.outputs else ''}".strip()
        )
        self.attrs = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
        self.proto = proto

    def input(self, index: int) -> str:
        """The name of an input, `""` if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def bodies(self) -> list[Any]:
        """The graphs of If, Loop and Scan."""
        import onnx

        found = []
        for attribute in self.proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found.append(attribute.g)
            found.extend(attribute.graphs)
        return found


class Graph:
    """A model that is looked at, never changed.

    Args:
        model: An `onnx.ModelProto`, without external data.
        folder: Where external data lies; None if unknown, and then it has no value here.
        target: The runtime that the file is meant for.

    Raises:
        ValueError: the nodes are not in the order in which they run, or two make one tensor.
    """

    def __init__(self, model: Any, folder: Path | None, target: str) -> None:
        self.target = target
        self.ir_version: int = model.ir_version
        standard = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
        self.opset: int = max(standard, default=0)
        graph = model.graph
        self.nodes = [Node(proto) for proto in graph.node]
        self.initializers = {c.name: c for c in graph.initializer}
        self.inputs = [i.name for i in graph.input if i.name not in self.initializers]
        self.outputs = [o.name for o in graph.output]
        self._producers = {o: node for node in self.nodes for o in node.outputs if o}
        self._check_order()
        self._consumers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for index, used in enumerate(node.inputs):
                self._consumers.setdefault(used, []).append((node, index))
            for used in sorted(_captured(node)):
                self._consumers.setdefault(used, []).append((node, -1))
        self._folder = folder
        self._constant: dict[str, bool] = {}
        self._values: dict[str, np.ndarray | None] = {}
        self._types = _inferred_types(model)

    def _check_order(self) -> None:
        # A cycle would have no end for whoever walks upstream.
        made: set[str] = set()
        for node in self.nodes:
            late = [name for name in node.inputs if name in self._producers and name not in made]
            twice = [name for name in node.outputs if name and name in made]
            if late or twice:
                what = f"reads {late[0]} before it is made" if late else f"makes {twice[0]} again"
                raise ValueError(f"{node.name} {what}; onnx.checker refuses such a graph as well")
            made.update(node.outputs)

    def producer(self, tensor: str, *ops: str) -> Node | None:
        """The node that makes `tensor`, if it is one of `ops` or none are given."""
        node = self._producers.get(tensor)
        return node if node is not None and (not ops or node.op in ops) else None

    def uses(self, tensor: str) -> list[tuple[Node, int]]:
        """The nodes that read `tensor` and the index of the input; -1 from inside a body."""
        return self._consumers.get(tensor, [])

    def consumers(self, tensor: str) -> list[Node]:
        """The nodes that read `tensor`, once for each input."""
        return [node for node, _ in self.uses(tensor)]

    def sole_consumer(self, tensor: str) -> bool:
        """Whether one node and no graph output reads `tensor`."""
        return len(self.uses(tensor)) == 1 and tensor not in self.outputs

    def einsum(self, node: Node) -> MatrixProduct | None:
        """The matrix product that an Einsum of two tensors of known rank is; None for any other."""
        shapes = [self.shape(name) for name in node.inputs]
        if node.op != "Einsum" or len(shapes) != 2 or None in shapes:
            return None
        equation = bytes(node.attrs.get("equation", b"")).decode()
        return matrix_product(equation, *(len(shape or ()) for shape in shapes))

    def products(self) -> list[Node]:
        """The nodes that multiply matrices: Gemm, MatMul, and Einsum where it is one of them."""
        return [n for n in self.nodes if n.op in ("Gemm", "MatMul") or self.einsum(n)]

    def entries(self, tensor: str) -> int | None:
        """The number of entries of `tensor`, None if a dimension varies or is unknown."""
        shape = self.shape(tensor)
        if shape is None or None in shape:
            return None
        return math.prod(size for size in shape if size is not None)

    def of(self, *ops: str) -> list[Node]:
        """The nodes of these types."""
        return [node for node in self.nodes if node.op in ops]

    def constant(self, tensor: str) -> bool:
        """Whether `tensor` is an initializer, or computed from initializers alone."""
        known = self._constant.get(tensor)
        if known is None:
            self._constant[tensor] = known = self._is_constant(tensor)
        return known

    def _is_constant(self, tensor: str) -> bool:
        # Without recursion: a chain of nodes may be longer than Python's stack.
        pending, found = [tensor], set()
        while pending:
            name = pending.pop()
            if not name or name in self.initializers or name in found:
                continue
            node = self._producers.get(name)
            if node is None or node.op.startswith(("Random", "Multinomial", "Bernoulli")):
                return False
            if self._constant.get(name) is False:
                return False
            if self._constant.get(name) is None:
                if _captured(node) or (not node.inputs and node.op != "Constant"):
                    return False
                pending.extend(node.inputs)
            found.add(name)
        return bool(tensor)

    def value(self, tensor: str) -> np.ndarray | None:
        """The value of a constant; None for what is no constant or cannot be computed.

        Raises:
            OSError: external data cannot be read.
        """
        if tensor in self._values:
            return self._values[tensor]
        value = self._compute(tensor) if self.constant(tensor) else None
        # Scales are asked for again and again, large weights once.
        if value is None or value.size <= _LARGE:
            self._values[tensor] = value
        return value

    def _compute(self, tensor: str) -> np.ndarray | None:
        import onnx
        import onnx.reference

        constant = self.initializers.get(tensor)
        if constant is not None:
            return self._read(constant)
        node = self._producers[tensor]
        if node.op == "Constant":
            value = next(iter(node.attrs.values()), None)
            held = isinstance(value, onnx.TensorProto)
            return self._read(value) if held else np.asarray(value)
        arguments = {name: self.value(name) for name in node.inputs if name}
        if any(value is None for value in arguments.values()):
            return None
        body = onnx.helper.make_graph(
            [node.proto],
            "constant",
            [onnx.helper.make_tensor_value_info(n, 0, None) for n in arguments],
            [onnx.helper.make_tensor_value_info(tensor, 0, None)],
        )
        imports = [onnx.helper.make_opsetid("", self.opset)]
        try:
            model = onnx.helper.make_model(body, opset_imports=imports)
            results: Any = onnx.reference.ReferenceEvaluator(model).run(None, arguments)
            return np.asarray(results[0])
        except Exception:
            # The reference raises whatever its operators raise; the value stays unknown.
            return None

    def _read(self, constant: Any) -> np.ndarray | None:
        import onnx

        if constant.data_location == onnx.TensorProto.EXTERNAL:
            if self._folder is None:
                return None
            loaded = onnx.TensorProto()
            loaded.CopyFrom(constant)
            onnx.external_data_helper.load_external_data_for_tensor(loaded, str(self._folder))
            constant = loaded
        try:
            return np.asarray(onnx.numpy_helper.to_array(constant))
        except ValueError:
            # The data does not fill the dimensions; the checker of ONNX says so.
            return None

    def shape(self, tensor: str) -> tuple[int | None, ...] | None:
        """The dimensions, None for those that vary; None if not even the rank is known."""
        if tensor in self.initializers:
            return tuple(self.initializers[tensor].dims)
        return self._types.get(tensor, (0, None))[1]

    def dtype(self, tensor: str) -> int:
        """The `onnx.TensorProto` data type, 0 if unknown."""
        if tensor in self.initializers:
            return int(self.initializers[tensor].data_type)
        return self._types.get(tensor, (0, None))[0]

    def inner_nodes(self) -> Iterator[tuple[Node, Node]]:
        """The nodes inside of If, Loop and Scan, each with the outermost node it lies in."""
        for outer in self.nodes:
            pending = outer.bodies()
            while pending:
                for proto in pending.pop(0).node:
                    inner = Node(proto)
                    yield outer, inner
                    pending.extend(inner.bodies())

    def quantizers(self) -> list[Node]:
        """The Q nodes, and the DQ nodes of stored codes: one node for each quantized tensor."""
        return [
            node
            for node in self.of(*QDQ)
            if node.op == "QuantizeLinear" or self.producer(node.input(0), *QDQ[:1]) is None
        ]


def open_graph(model: Any, target: str) -> Graph:
    """The graph of a path or an `onnx.ModelProto`.

    Raises:
        OSError: the file or its external data is missing or cannot be read.
        ValueError: the file is no ONNX model, or its nodes are not in order.
    """
    import onnx
    import onnx.inliner

    if isinstance(model, onnx.ModelProto):
        folder = None
    else:
        path = Path(os.fspath(model))
        model, folder = read_model(path), path.parent
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return Graph(model, folder, target)


def _captured(node: Node) -> set[str]:
    """The outer tensors that the bodies of a node read."""
    names: set[str] = set()
    for body in node.bodies():
        own = {i.name for i in (*body.input, *body.initializer)}
        own |= {o for inner in body.node for o in inner.output}
        used = {o.name for o in body.output}
        for proto in body.node:
            inner = Node(proto)
            used |= set(inner.inputs) | _captured(inner)
        names |= used - own
    return names - {""}


def _inferred_types(model: Any) -> dict[str, tuple[int, tuple[int | None, ...] | None]]:
    """Types and shapes of all tensors, inferred on a copy that holds no large constants."""
    import onnx

    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    graph = light.graph
    graph.name = "shapes"
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    constants = {c.name for c in model.graph.initializer}
    graph.input.extend(i for i in model.graph.input if i.name not in constants)
    for constant in model.graph.initializer:
        small = math.prod(constant.dims) <= _LARGE
        if small and constant.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(constant)
        else:
            graph.input.append(
                onnx.helper.make_tensor_value_info(
                    constant.name, constant.data_type, list(constant.dims)
                )
            )
    try:
        graph = onnx.shape_inference.infer_shapes(light).graph
    except Exception:
        # A graph that is not well-formed is what rules are for; what it declares is left.
        graph = light.graph
    types: dict[str, tuple[int, tuple[int | None, ...] | None]] = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        shape = None
        if tensor.HasField("shape"):
            shape = tuple(
                d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim
            )
        types[info.name] = (tensor.elem_type, shape)
    return types
