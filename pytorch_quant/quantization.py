"""Quantizing a model that is already built.

quantize(model, example_inputs=images)
print(placement_plan(other_model, images).quantizers)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pytorch_quant.dataflow import record
from pytorch_quant.example_inputs import keep_form
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.placement.apply import apply_plan
from pytorch_quant.placement.plan import Plan
from pytorch_quant.placement.planning import check_placement, make_plan

_recording: ContextVar[bool] = ContextVar("recording", default=False)


def quantize(
    model: nn.Module,
    rules: Mapping[Any, Any] | None = None,
    *,
    example_inputs: Any = None,
    placement: str = "tensorrt",
) -> nn.Module:
    """Put quantizers into `model`, in place, where a runtime wants them.

    Layers become their quantized forms. With a placement, one forward pass is recorded, and the
    calls between the layers (residual additions, concatenations, matrix products, functional
    layers) are quantized as well. All modules stay the same objects: hooks, tied weights and
    optimizers that hold the parameters keep working. After any error the model is as it was.

    Args:
        model: A model in eager mode, with its parameters on a real device. One that has quantizers
            already is returned unchanged, with a warning.
        rules: How layers and calls are quantized, `{key: Scheme or None}`. A key is an exact
            qualified name, a glob, a module type or a torch function; None leaves float. Weak to
            strong: type or function, glob, exact name; within a kind the later entry wins.
        example_inputs: A batch as the model takes it: a tensor, a mapping of keywords, or a tuple
            or list of arguments. The path that it takes through the model is what is quantized.
        placement: `"tensorrt"`, `"onnxruntime"` or `"openvino"`; `"none"` quantizes the inputs and
            weights of layers alone and needs no example inputs.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module or a scripted one, or `example_inputs` is of a wrong type.
        ValueError: an unknown placement, a placement without example inputs, a rule that does not
            hold, or, without rules, a model in which nothing can be quantized.
        RuntimeError: parameters without values (on the meta device, or lazy), a compiled model, or
            a call from the forward of a model that is just being recorded.
        Exception: whatever the model raises in the recorded pass.
    """
    _check(model, example_inputs, placement)
    present = len(named_quantizers(model))
    if present:
        warnings.warn(
            f"the model holds {present} quantizers already and is left unchanged; to quantize it "
            "in another way, start from a float model",
            UserWarning,
            stacklevel=2,
        )
        return model
    plan = _plan(model, example_inputs, rules, placement)
    if not plan.quantizers and not rules:
        raise ValueError(_nothing_to_quantize(model, plan))
    apply_plan(model, plan)
    if example_inputs is not None:
        keep_form(model, example_inputs)
    return model


def placement_plan(
    model: nn.Module,
    example_inputs: Any,
    rules: Mapping[Any, Any] | None = None,
    placement: str = "tensorrt",
) -> Plan:
    """What `quantize` would do with the same arguments; the model is left as it is.

    Args:
        model: As for `quantize`.
        example_inputs: As for `quantize`; None with the placement `"none"`.
        rules: As for `quantize`.
        placement: As for `quantize`.

    Returns:
        The quantizers with their places, and what stays float, each with the reason.

    Raises:
        TypeError: as for `quantize`.
        ValueError: as for `quantize`.
        RuntimeError: as for `quantize`.
        Exception: whatever the model raises in the recorded pass.
    """
    _check(model, example_inputs, placement)
    return _plan(model, example_inputs, rules, placement)


def _plan(
    model: nn.Module, example_inputs: Any, rules: Mapping[Any, Any] | None, placement: str
) -> Plan:
    flow = None
    if example_inputs is not None:
        with _while_recording():
            flow = record(model, example_inputs)
    return make_plan(model, flow, rules, placement)


def _nothing_to_quantize(model: nn.Module, plan: Plan) -> str:
    name = type(model).__name__
    message = f"there is nothing to quantize in {name}"
    if plan.left:
        left = "; ".join(f"{item.site or name}: {item.reason}" for item in plan.left[:3])
        return f"{message} without rules: {left}"
    return f"{message}: no convolutions, linear layers or other products, additions or pools"


@contextmanager
def _while_recording() -> Iterator[None]:
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def _check_written_in_python(model: Any) -> None:
    """Raise unless `model` has layers and a forward that quantizers can be placed in."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "a scripted or traced model has no Python forward to place quantizers in; quantize "
            "the module that it was made of"
        )
    # Its modes are fixed, which is what torch.export puts into the instance.
    exported = isinstance(model, torch.fx.GraphModule) and {"train", "eval"} <= vars(model).keys()
    if exported or isinstance(model, torch.export.ExportedProgram):
        raise TypeError(
            "the model was exported by torch.export, which has taken its layers apart; quantize "
            "the module that it was made of, then export that"
        )
    # The class itself is not asked for: importing the compiler takes seconds.
    if type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        raise RuntimeError(
            "the model is compiled; quantize the original (model._orig_mod), then compile that"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize takes a module, got {type(model).__name__}")


def _check(model: Any, example_inputs: Any, placement: Any) -> None:
    _check_written_in_python(model)
    if _recording.get():
        raise RuntimeError(
            f"{type(model).__name__}: quantize was called in a forward pass that quantize itself "
            "is recording; call it outside of forward"
        )
    check_placement(placement)
    if example_inputs is None and placement != "none":
        raise ValueError(
            f"placement={placement!r} has to see one forward pass; pass example_inputs=, or "
            'placement="none" to quantize layers alone'
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise RuntimeError(f"{name} has no shape yet; run the lazy model on a batch first")
        if tensor.is_meta:
            raise RuntimeError(
                f"{name} is on the meta device and has no values; materialize the model first "
                "(model.to_empty(device=...), then load its weights)"
            )
