"""The two exporters of torch, each giving an `onnx.ModelProto`."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.export.arguments import apart
from pytorch_quant.export.marks import marked_pairs
from pytorch_quant.export.wiring import Wiring, is_standard
from pytorch_quant.nn.modes import named_quantizers, preserved_modes

_NO_LIMIT = 2**40


def traced(
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    opset: int | None,
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    dynamo: bool,
) -> Any:
    """Run an exporter on `model` in eval mode; the model comes back as it was.

    Args:
        model: Calibrated.
        args: Arguments of the model; a dict at the end holds keywords.
        opset: Version of the standard operator set, None for the exporter's own.
        dynamic_shapes: As in `torch.onnx.export`.
        input_names: Names of the graph inputs.
        output_names: Names of the graph outputs.
        dynamo: By the current exporter, else by the TorchScript one.

    Returns:
        An `onnx.ModelProto` whose weights are float, with Q/DQ pairs of constant scales.

    Raises:
        ValueError: more names than the graph has inputs or outputs.
        Exception: whatever the exporter raises.
    """
    names = {"input_names": input_names, "output_names": output_names}
    with _ready_to_export(model):
        if dynamo:
            proto = _by_the_current_exporter(model, apart(args), opset, dynamic_shapes, names)
        else:
            proto = _by_torchscript(model, args, opset, dynamic_shapes, names)
    # The exporters leave out what is too many.
    for kind, asked, held in (
        ("input_names", input_names, proto.graph.input),
        ("output_names", output_names, proto.graph.output),
    ):
        if asked is not None and len(asked) > len(held):
            raise ValueError(
                f"{kind} has {len(asked)} names, {', '.join(asked)}, and the graph has {len(held)}:"
                f" {', '.join(port.name for port in held)}"
            )
    return proto


@contextmanager
def _ready_to_export(model: nn.Module) -> Iterator[None]:
    with preserved_modes(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        for quantizer in named_quantizers(model).values():
            quantizer.disable_calib()
        # The exporters know no fused kernels of a whole Transformer layer.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _by_the_current_exporter(
    model: nn.Module, args: tuple[Any, ...], opset: int | None, dynamic_shapes: Any, names: Any
) -> Any:
    with marked_pairs(model) as translations:
        program = torch.onnx.export(
            model,
            args,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=translations,
            **names,
        )
    assert program is not None
    proto = program.model_proto
    if _holds_computed_constants(proto.graph):
        import onnxscript.optimizer

        # The exporter's own folding leaves large constants, such as recurrent weights put together.
        onnxscript.optimizer.optimize_ir(
            program.model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT
        )
        proto = program.model_proto
    _drop_idle_axes(proto.graph)
    return proto


def _drop_idle_axes(graph: Any) -> None:
    """Drop the axis of per-tensor nodes, which the exporter writes as the default that it is."""
    wiring = Wiring(graph)
    for node in graph.node:
        if is_standard(node, "QuantizeLinear", "DequantizeLinear"):
            scale = wiring.held(node.input[1])
            if scale is not None and not scale.dims:
                for found in [a for a in node.attribute if a.name == "axis"]:
                    node.attribute.remove(found)


def _holds_computed_constants(graph: Any) -> bool:
    """Whether a scale or a weight under a Q is the result of nodes."""
    wiring = Wiring(graph)
    clips = ("Max", "Min", "Clip")
    return any(
        used in wiring.constants
        and used not in wiring.initializers
        and not is_standard(wiring.producers[used], *clips)
        for node in graph.node
        if is_standard(node, "QuantizeLinear", *clips)
        for used in node.input
    )


def _by_torchscript(
    model: nn.Module, args: tuple[Any, ...], opset: int | None, dynamic_shapes: Any, names: Any
) -> Any:
    import onnx

    given = names["input_names"] or _names_of_tensors(model, args)
    axes = dynamic_axes(dynamic_shapes, given)
    with tempfile.TemporaryDirectory() as folder:
        # A file, because large models do not fit into one buffer.
        path = Path(folder) / "traced.onnx"
        torch.onnx.export(
            model,
            args,
            path,
            dynamo=False,
            opset_version=opset,
            dynamic_axes=axes,
            input_names=given,
            output_names=names["output_names"],
        )
        proto = onnx.load(path)
    _store_constants(proto.graph)
    return proto


def _names_of_tensors(model: nn.Module, args: tuple[Any, ...]) -> list[str] | None:
    """The names of the parameters of `forward` that tensors are given for; None if nested."""
    named = dict(args[-1]) if args and isinstance(args[-1], Mapping) else {}
    positional = args[:-1] if args and isinstance(args[-1], Mapping) else args
    try:
        bound = inspect.signature(model.forward).bind(*positional, **named).arguments
    except (TypeError, ValueError):
        return None
    values = []
    for name, value in bound.items():
        several = isinstance(value, tuple) and name not in named
        values += [(f"{name}_{i}", v) for i, v in enumerate(value)] if several else [(name, value)]
    if any(isinstance(value, (list, tuple, dict)) for _, value in values):
        return None
    return [name for name, value in values if isinstance(value, Tensor)]


def dynamic_axes(dynamic_shapes: Any, names: Sequence[str] | None) -> dict[str, Any] | None:
    """`dynamic_shapes` of the current exporter as the `dynamic_axes` of the TorchScript one.

    Args:
        dynamic_shapes: For each input a dict, list or tuple of names or `torch.export.Dim`; a
            tuple in the order of the inputs, or a dict by name.
        names: The names of the inputs in the file.

    Raises:
        ValueError: nested shapes, or inputs whose names are not known.
    """
    if not dynamic_shapes:
        return None
    if names is None:
        raise ValueError(
            "dynamic_shapes with nested inputs are for the current exporter; use dynamo=True"
        )
    if isinstance(dynamic_shapes, Mapping):
        given = dict(dynamic_shapes)
    else:
        given = dict(zip(names, dynamic_shapes, strict=False))
    if not set(given) <= set(names):
        # By the parameters of forward, while the file names its inputs otherwise.
        given = dict(zip(names, given.values(), strict=False))
    axes: dict[str, Any] = {}
    for name, shape in given.items():
        if not shape:
            continue
        if not isinstance(shape, (Mapping, list, tuple)):
            raise ValueError(f"dynamic_shapes of {name} are a dict or a list, got {shape!r}")
        pairs = shape.items() if isinstance(shape, Mapping) else enumerate(shape)
        axes[name] = {
            axis: dim if isinstance(dim, str) else getattr(dim, "__name__", f"{name}_dim_{axis}")
            for axis, dim in pairs
            if dim is not None and not (isinstance(dim, int) and not isinstance(dim, bool))
        }
    return axes


def _store_constants(graph: Any) -> None:
    """Make initializers of the constants that Q, DQ and the clips before them read, in place."""
    kinds = ("QuantizeLinear", "DequantizeLinear", "Max", "Min", "Clip")
    wiring = Wiring(graph)
    read = {used for node in graph.node if is_standard(node, *kinds) for used in node.input}
    for name in sorted(read - set(wiring.initializers)):
        node = wiring.producers.get(name)
        held = None if node is None else wiring.held(name)
        if node is not None and held is not None:
            stored = graph.initializer.add()
            stored.CopyFrom(held)
            stored.name = name
            graph.node.remove(node)
