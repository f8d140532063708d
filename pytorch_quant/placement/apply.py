"""Carrying out a plan on a built model: all of it, or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn.mixins import QuantInputMixin
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.placement.call_sites import (
    QUANTIZERS,
    CallQuantizers,
    CallSites,
    quantizer_key,
)
from pytorch_quant.placement.frames import FUSED, SITES, framed_class
from pytorch_quant.placement.plan import Operand, Place, Plan, PlannedQuantizer
from pytorch_quant.placement.swap import (
    operands_of,
    quantized_form,
    quantizers_of,
    swap_layer,
)

# Files of torch.nn.modules with layers that call what is quantized. The others (activations,
# norms, containers, ...) need no frame, unless they were seen to make such calls.
_CALLING = ("adaptive", "conv", "distance", "linear", "pooling", "rnn", "sparse", "transformer")


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Put the quantizers of `plan` into `model`, in place.

    Layers and modules with quantized calls change their class and stay the same objects. A layer
    that is quantized already keeps its quantizers; where the plan has them shared, the other places
    get them too.

    Args:
        model: A model with the modules that the plan names.
        plan: What to do.

    Returns:
        The model.

    Raises:
        ValueError: the plan does not fit the model or itself. As with any other error, the model
            is left as it was.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    _check(modules, plan)
    with _all_or_nothing(model):
        _swap_layers(modules, plan)
        for planned in plan.quantizers:
            _put_quantizer(model, modules, planned)
        _frame_modules(model, modules, plan)
    return model


def _check(modules: dict[str, nn.Module], plan: Plan) -> None:
    taken: set[tuple[int, str | None, Operand]] = set()
    for name in (*plan.counts, *plan.framed):
        if name not in modules:
            raise ValueError(f"the plan names a module {name!r}, which the model does not have")
    for planned in plan.quantizers:
        if not planned.places:
            raise ValueError(f"the plan has a quantizer for {planned.op!r} without a place")
        for place in planned.places:
            if place.module not in modules:
                raise ValueError(f"{place.site}: the model has no module {place.module!r}")
            key = (id(modules[place.module]), place.call, place.operand)
            if key in taken:
                raise ValueError(f"{place.site}: {place.operand} gets two quantizers")
            taken.add(key)
            if place.call is None:
                _check_layer(modules[place.module], place, planned)
            else:
                _check_call(place, plan, planned)


def _check_layer(layer: nn.Module, place: Place, planned: PlannedQuantizer) -> None:
    if not isinstance(layer, QuantInputMixin) and quantized_form(layer) is None:
        raise ValueError(
            f"{place.site}: {type(layer).__name__} has no quantized form; plan the torch functions "
            "that its forward calls"
        )
    if place.operand not in [(name,) for name in operands_of(layer)]:
        raise ValueError(f"{place.site}: {type(layer).__name__} has no operand {place.operand}")
    if isinstance(layer, nn.RNNBase) and len(planned.places) > 1:
        raise ValueError(
            f"{place.site}: the layers and directions of {type(layer).__name__} have quantizers "
            "of their own, which no other place can share"
        )


def _check_call(place: Place, plan: Plan, planned: PlannedQuantizer) -> None:
    found = re.fullmatch(r"(.+)#(\d+)", place.call or "")
    if not found or not place.operand:
        raise ValueError(f"{place.site}: a place in a call is such as ('add#0', (1,))")
    kind, number = found[1], int(found[2])
    count = plan.counts.get(place.module, {}).get(kind, 0)
    if number >= count:
        raise ValueError(f"{place.site}: the plan counts {count} calls of {kind!r} there")
    if not planned.descriptor.fake_quant:
        raise ValueError(
            f"{place.site}: a descriptor with fake_quant=False gives integer codes, which no call "
            "can take"
        )


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put classes, attributes and children back if anything is raised."""
    before = [
        (module, type(module), dict(module.__dict__), dict(module._modules))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, children in before:
            if type(module) is not kind:
                module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)
        raise


def _swap_layers(modules: dict[str, nn.Module], plan: Plan) -> None:
    descriptors: dict[nn.Module, dict[str, QuantDescriptor]] = {}
    for planned in plan.quantizers:
        for place in planned.places:
            if place.call is None:
                operands = descriptors.setdefault(modules[place.module], {})
                operands[str(place.operand[0])] = planned.descriptor
    for layer, wanted in descriptors.items():
        if not isinstance(layer, QuantInputMixin):
            swap_layer(layer, wanted)


def _put_quantizer(
    model: nn.Module, modules: dict[str, nn.Module], planned: PlannedQuantizer
) -> None:
    """Make it, or take that of the first of its layers, and put it at all of its places."""
    layers = [(modules[p.module], str(p.operand[0])) for p in planned.places if p.call is None]
    if layers:
        quantizer = quantizers_of(*layers[0])[0]
    else:
        owner = modules[planned.places[0].module]
        quantizer = TensorQuantizer(planned.descriptor).to(_device(owner, model))
        quantizer.training = owner.training
    for layer, operand in layers[1:]:
        setattr(layer, f"_{operand}_quantizer", quantizer)
    for place in planned.places:
        if place.call is not None:
            _hold(modules[place.module], quantizer_key(place.call, place.operand), quantizer)


def _hold(module: nn.Module, key: str, quantizer: TensorQuantizer) -> None:
    if QUANTIZERS not in module._modules:
        made = CallQuantizers()
        made.training = module.training
        nn.Module.add_module(module, QUANTIZERS, made)
    holder: Any = module._modules[QUANTIZERS]
    holder[key] = quantizer


def _device(owner: nn.Module, model: nn.Module) -> torch.device:
    for module in (owner, model):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")


def _frame_modules(model: nn.Module, modules: dict[str, nn.Module], plan: Plan) -> None:
    quantized: dict[str, dict[tuple[str, int], list[tuple[Operand, str]]]] = {}
    for planned in plan.quantizers:
        for place in planned.places:
            if place.call is not None:
                kind, number = place.call.rsplit("#", 1)
                calls = quantized.setdefault(place.module, {})
                key = quantizer_key(place.call, place.operand)
                calls.setdefault((kind, int(number)), []).append((place.operand, key))
    framed = {modules[name]: framed_class(type(modules[name])) for name in plan.framed}
    for name in plan.counts:
        for module in _inside(modules[name]):
            framed[module] = framed_class(type(module))
    sited = {
        modules[name]: CallSites(
            dict(counts), {k: tuple(v) for k, v in quantized.get(name, {}).items()}
        )
        for name, counts in plan.counts.items()
    }
    for module in model.modules():
        if isinstance(module, FUSED) and any(
            isinstance(inner, TensorQuantizer) for inner in module.modules()
        ):
            sited.setdefault(module, CallSites())
    for module, sites in sited.items():
        module.__dict__[SITES] = sites
        framed[module] = framed_class(type(module), sited=True)
    for module, form in framed.items():
        module.__class__ = form


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside of one with counted calls that could make calls of their own.

    Those too that the recorded pass did not reach, such as a head for training alone.
    """
    for name, child in module._modules.items():
        if child is None or name == QUANTIZERS or isinstance(child, torch.jit.ScriptModule):
            continue
        if isinstance(child, (QuantInputMixin, TensorQuantizer)):
            # Its frame covers the quantizers in it.
            yield child
            continue
        package, _, file = type(child).__module__.rpartition(".")
        builtin = package == "torch.nn.modules"
        if not builtin or file in _CALLING or isinstance(child, nn.MultiheadAttention):
            yield child
        yield from _inside(child)
