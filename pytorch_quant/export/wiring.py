"""Who makes, reads and holds each tensor of a graph that is being edited."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

_STANDARD = ("", "ai.onnx")
# What stands between a weight and its Q, with the same meaning since operator set 13.
_EXACT = ("Transpose", "Reshape", "Flatten", "Identity", "Max", "Min", "Neg", "Clip")
_REFERENCE_OPSET = 21


class Wiring:
    """An `onnx.GraphProto` as it was when this was made; make another one after an edit.

    Attributes:
        producers: The node that makes each tensor.
        readers: The nodes that read each tensor, with the index of the input.
        captured: What the bodies of If, Loop and Scan read from outside.
        outputs: Names of the graph outputs.
        inputs: Names of the graph inputs, those among them that are initializers as well.
        initializers: The stored constants.
        constants: Names of all tensors that are stored, or computed from stored ones alone.
    """

    def __init__(self, graph: Any) -> None:
        self.producers = {o: node for node in graph.node for o in node.output if o}
        self.readers: dict[str, list[tuple[Any, int]]] = {}
        self.captured: set[str] = set()
        self.outputs = {o.name for o in graph.output}
        self.inputs = {i.name for i in graph.input}
        self.initializers = {c.name: c for c in graph.initializer}
        self.constants = set(self.initializers)
        for node in graph.node:
            for index, used in enumerate(node.input):
                self.readers.setdefault(used, []).append((node, index))
            inner = read_by_bodies(node)
            self.captured |= inner
            given = [name for name in node.input if name]
            made_of_constants = given and not inner and self.constants.issuperset(given)
            if is_standard(node, "Constant") or made_of_constants:
                self.constants.update(node.output)

    def uses(self, tensor: str) -> list[tuple[Any, int]]:
        """The nodes that read `tensor`, with the index of the input."""
        return self.readers.get(tensor, [])

    def sole_use(self, tensor: str) -> bool:
        """Whether one node, once, and nothing else reads `tensor`."""
        return len(self.uses(tensor)) == 1 and tensor not in self.outputs | self.captured

    def value(self, tensor: str) -> np.ndarray | None:
        """What an initializer or a Constant node holds; None for any other tensor."""
        import onnx

        held = self.held(tensor)
        if held is None or held.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return np.asarray(onnx.numpy_helper.to_array(held))

    def computed(self, tensor: str) -> np.ndarray | None:
        """The value of a constant, computed where operators that are exact make it."""
        import onnx
        import onnx.reference

        value = self.value(tensor)
        node = self.producers.get(tensor)
        if value is not None or node is None or tensor not in self.constants:
            return value
        if not is_standard(node, *_EXACT):
            return None
        given = {name: self.computed(name) for name in node.input if name}
        if any(array is None for array in given.values()):
            return None
        infos = [onnx.helper.make_tensor_value_info(name, 0, None) for name in given]
        out = onnx.helper.make_tensor_value_info(tensor, 0, None)
        body = onnx.helper.make_graph([node], "constant", infos, [out])
        imports = [onnx.helper.make_opsetid("", _REFERENCE_OPSET)]
        model = onnx.helper.make_model(body, opset_imports=imports)
        results: Any = onnx.reference.ReferenceEvaluator(model).run(None, given)
        return np.asarray(results[0])

    def held(self, tensor: str) -> Any:
        """The `onnx.TensorProto` of an initializer or a Constant node; None for any other."""
        if tensor in self.initializers:
            return self.initializers[tensor]
        node = self.producers.get(tensor)
        if node is None or not is_standard(node, "Constant"):
            return None
        return next((a.t for a in node.attribute if a.name == "value"), None)


def is_standard(node: Any, *ops: str) -> bool:
    """Whether the node is one of these operators of the standard domain."""
    return node.op_type in ops and node.domain in _STANDARD


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    import onnx

    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def read_by_bodies(node: Any) -> set[str]:
    """The names that the bodies of If, Loop and Scan read, their own among them."""
    read: set[str] = set()
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            read |= {output.name for output in body.output}
            for inner in body.node:
                read |= set(inner.input) | read_by_bodies(inner)
    return read


def free_name(name: str, taken: set[str]) -> str:
    """`name`, with a number where it is taken; entered into `taken`."""
    candidate, k = name, 1
    while candidate in taken:
        candidate, k = f"{name}_{k}", k + 1
    taken.add(candidate)
    return candidate


def names(graph: Any) -> set[str]:
    """All names of tensors, those in bodies included."""
    taken = {c.name for c in (*graph.initializer, *graph.input, *graph.output)}
    for node in graph.node:
        taken |= {*node.input, *node.output} | read_by_bodies(node)
    return taken


def read_instead(graph: Any, replaced: dict[str, str]) -> None:
    """Let every node read the new name of each tensor in `replaced`."""
    for node in graph.node:
        for index, used in enumerate(node.input):
            while used in replaced:
                used = replaced[used]
            node.input[index] = used


def set_attribute(node: Any, name: str, value: Any) -> None:
    """Write an attribute, in place of what it was."""
    import onnx

    for attribute in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute(name, value))


def keep_nodes(graph: Any, kept: Iterable[Any]) -> None:
    """Let the graph hold these nodes, in this order."""
    nodes = list(kept)
    del graph.node[:]
    graph.node.extend(nodes)


def drop_unread(graph: Any, candidates: set[str]) -> None:
    """Drop what makes or holds `candidates` and nothing reads any more, and what only that read."""
    while True:
        wiring = Wiring(graph)
        read = wiring.readers.keys() | wiring.captured | wiring.outputs
        gone = [n for n in graph.node if n.output and {*n.output} <= candidates - read]
        held = [c for c in graph.initializer if c.name in candidates - read - wiring.inputs]
        if not gone and not held:
            return
        candidates = candidates | {name for node in gone for name in node.input}
        left = {id(item) for item in (*gone, *held)}
        keep_nodes(graph, [n for n in graph.node if id(n) not in left])
        kept = [c for c in graph.initializer if c.name not in {c.name for c in held}]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        made = {o for node in gone for o in node.output} | {c.name for c in held}
        infos = [i for i in graph.value_info if i.name not in made]
        del graph.value_info[:]
        graph.value_info.extend(infos)
