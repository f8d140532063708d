"""Which layer and node of a file are to blame for a tensor that is not torch's."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pytorch_quant.export.cut_graph import CutGraph, upstream
from pytorch_quant.export.engines import open_session
from pytorch_quant.export.qdq_sites import Site, layer_of
from pytorch_quant.export.simulation import LayerCall, Simulation
from pytorch_quant.export.verify_layers import Difference, agrees
from pytorch_quant.export.verify_report import Divergence, compare


def in_one_part(
    cut: CutGraph, difference: Difference, simulation: Simulation, sites: list[Site]
) -> Divergence:
    """Name the layer and the node within the part of a graph that makes a wrong tensor.

    Layers are recognized by the values that torch computes for them: the first layer of torch whose
    output no node of the part makes is where it goes wrong.

    Args:
        cut: The graph that was evaluated.
        difference: What was found.
        simulation: A pass with `layers=True`.
        sites: The pairs that the graph is cut at.
    """
    part = cut.part(difference.tensor)
    made = [name for node in part for name in node.output if name]
    cut.evaluate(made)
    known = _Known([cut.tensors[name] for name in cut.tensors])
    last = difference.site.call.order if difference.site is not None else math.inf
    names = {name for node in part for name in node.input}
    weighted = {layer_of(s.name) for s in sites if s.weight and not names.isdisjoint(s.made)}
    suspects = [
        call
        for call in simulation.layers
        if call.order < last
        and not all(map(known.holds, call.outputs))
        and (call.name in weighted or any(n.startswith(f"{call.name}.") for n in names))
    ]
    # Whatever comes after a wrong layer is wrong too, and some are fused with the next.
    fed = [call for call in suspects if all(map(known.holds, call.inputs))]
    culprit = next(iter(fed or suspects), None)
    node = _first_wrong(cut, part, simulation.layers, culprit, weighted)
    layer = culprit.name if culprit is not None else ""
    if not layer and difference.site is not None:
        layer = layer_of(difference.site.name)
    return Divergence(layer, node.name, difference.tensor, difference.problem, cut.engine)


class _Known:
    """Tensors by size, to be found by value."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._by_size: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            self._by_size.setdefault(tensor.numel(), []).append(tensor)

    def holds(self, tensor: Tensor) -> bool:
        return any(agrees(other, tensor) for other in self._by_size.get(tensor.numel(), []))


def _first_wrong(
    cut: CutGraph,
    part: list[Any],
    layers: list[LayerCall],
    culprit: LayerCall | None,
    weighted: set[str],
) -> Any:
    """The first node that no right tensor is made of, the culprit's own if one shows its name."""
    right: set[str] = set()
    made = {name: node for node in part for name in node.output if name}
    outputs = [output for call in layers if call is not culprit for output in call.outputs]
    known = _Known(outputs)
    for name in made:
        if name not in right and known.holds(cut.tensors[name]):
            pending = [name]
            while pending:
                reached = pending.pop()
                if reached in made and reached not in right:
                    right.add(reached)
                    pending.extend(made[reached].input)
    wrong = [node for node in part if right.isdisjoint(node.output)]
    if culprit is not None:
        prefix = f"{culprit.name}."
        own = [n for n in wrong if any(name.startswith(prefix) for name in n.input)]
        if own:
            return own[-1]
        weights = {n.output[0] for n in part if n.name.startswith(prefix)}
        own = [n for n in wrong if not weights.isdisjoint(n.input)]
        if own:
            return own[0]
    return (wrong or part)[0]


def in_the_whole(
    cut: CutGraph,
    model: Any,
    engine: str,
    sites: list[Site],
    inputs: list[Tensor],
    simulation: Simulation,
    min_sqnr: float,
) -> Divergence:
    """Find by bisection the first tensor that an engine computes too far from torch's.

    First among what reaches quantizers and outputs, then among the tensors before the one that was
    found. Each question is a run of the model up to one tensor, so that the engine fuses what it
    fuses in the whole model.

    Args:
        cut: Evaluated, and found to be what torch computes.
        model: The `onnx.ModelProto`.
        engine: The engine.
        sites: The Q/DQ pairs, in the order of the graph.
        inputs: What the model takes.
        simulation: A pass with `layers=True`.
        min_sqnr: dB, below which a tensor is too far.
    """
    order = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    ends: dict[str, Site | None] = {output.name: None for output in model.graph.output}
    ends |= {site.source: site for site in sites if not site.weight}
    floats = [name for name in ends if name in order and cut.tensors[name].is_floating_point()]
    known = {name: cut.tensors[name] for name in floats}
    end = _first_far(model, engine, sorted(floats, key=order.__getitem__), known, inputs, min_sqnr)
    made = [name for node in cut.part(end) for name in node.output if name in order]
    cut.evaluate(made)
    inner = [n for n in made if cut.tensors[n].is_floating_point() and n not in cut.dequantized]
    known = {name: cut.tensors[name] for name in inner}
    tensor = _first_far(model, engine, inner, known, inputs, min_sqnr)
    node = next(n for n in model.graph.node if tensor in n.output)
    sqnr = compare(known[tensor], run_to(model, engine, tensor, inputs))[2]
    after = set(inner[inner.index(tensor) :])
    layer = next(
        (
            call.name
            for name in inner
            if name in after
            for call in simulation.layers
            if any(agrees(known[name], output) for output in call.outputs)
        ),
        "",
    )
    site = ends[end]
    if not layer and site is not None:
        layer = layer_of(site.name)
    problem = f"{sqnr:.1f} dB from torch's, below {min_sqnr:g}, where what it is made of is close"
    return Divergence(layer, node.name, tensor, problem, engine)


def _first_far(
    model: Any,
    engine: str,
    names: list[str],
    known: dict[str, Tensor],
    inputs: list[Tensor],
    min_sqnr: float,
) -> str:
    """The first of `names` that is too far from what is known of it; the last if none is."""
    low, high = 0, len(names) - 1
    while low < high:
        middle = (low + high) // 2
        found = run_to(model, engine, names[middle], inputs)
        if compare(known[names[middle]], found)[2] < min_sqnr:
            high = middle
        else:
            low = middle + 1
    return names[low]


def run_to(model: Any, engine: str, tensor: str, inputs: list[Tensor]) -> Tensor:
    """What an engine computes for one tensor of a model, and for nothing after it."""
    import onnx

    shorter = type(model)()
    shorter.CopyFrom(model)
    nodes = upstream(shorter.graph, tensor)
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del shorter.graph.node[:]
    shorter.graph.node.extend(kept)
    del shorter.graph.output[:]
    shorter.graph.output.extend([onnx.ValueInfoProto(name=tensor)])
    inferred = onnx.shape_inference.infer_shapes(shorter)
    return open_session(inferred, engine).run(inputs)[0]
