"""The places where a model is quantized, under the names that rules take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pytorch_quant.nn.mixins import QuantInputMixin
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.placement.call_sites import QUANTIZERS, CallQuantizers
from pytorch_quant.placement.frames import SITES


@dataclass(frozen=True)
class Holder:
    """A quantizer where one module holds it; one that is shared has several holders.

    Attributes:
        module: The module whose child it is.
        key: The name of the child.
        quantizer: The quantizer.
        name: Its qualified name here.
    """

    module: nn.Module
    key: str
    quantizer: TensorQuantizer
    name: str


@dataclass(frozen=True)
class Site:
    """A layer or a call with its quantizers: what a rule leaves float as a whole.

    Attributes:
        name: The key of its rule: `layer1.0.conv1`, `layer1.0/add#0`; `""` for a model that is one
            layer. Of a quantizer that a module holds beside other layers, the name of the
            quantizer itself, which is no key of a rule.
        kind: `Conv2d`, `Linear`, ...; of a call its kind, such as `add`; `quantizer` for one that
            stands alone.
        holders: Its quantizers.
        layer: The layer; None for a call or a quantizer that stands alone.
    """

    name: str
    kind: str
    holders: tuple[Holder, ...]
    layer: nn.Module | None = None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of torch.compile, DataParallel and DistributedDataParallel.

    Names inside of it are those that rules for a fresh model take.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_active(quantizer: TensorQuantizer) -> bool:
    """Whether it changes what passes through it."""
    return quantizer.quantizes or quantizer.clips


def lacks_range(quantizer: TensorQuantizer) -> bool:
    """Whether it would quantize, but calibration did not give it a range."""
    if quantizer.needs_amax:
        return True
    amax = None if quantizer.dynamic or not is_active(quantizer) else quantizer.amax
    # NaN stands for a quantizer that calibration did not reach.
    return amax is not None and not amax.is_meta and bool(amax.isnan().any())


def find_sites(model: nn.Module) -> list[Site]:
    """The layers and calls of `model` that hold quantizers, in the order of the model."""
    modules = dict(model.named_modules())
    found: dict[str, Site] = {}
    for name, module in modules.items():
        for key, child in module._modules.items():
            if not isinstance(child, TensorQuantizer):
                continue
            holder = Holder(module, key, child, f"{name}.{key}" if name else key)
            site = _site_of(modules, name, module, holder)
            if site.name in found:
                first = found[site.name]
                site = Site(site.name, site.kind, (*first.holders, holder), site.layer)
            found[site.name] = site
    if isinstance(model, TensorQuantizer):
        raise ValueError("the model is a TensorQuantizer; pass the model that holds it")
    return list(found.values())


def _site_of(modules: dict[str, nn.Module], name: str, module: nn.Module, holder: Holder) -> Site:
    if isinstance(module, CallQuantizers):
        owner = name.removesuffix(QUANTIZERS).removesuffix(".")
        kind, number = _call_of(modules[owner], holder.key)
        return Site(f"{owner}/{kind}#{number}", kind, (holder,))
    owner = name
    while isinstance(modules[owner], (nn.ModuleList, nn.ModuleDict)) and owner:
        owner = owner.rpartition(".")[0]
    layer = modules[owner]
    others = (m for m in layer.modules() if m is not layer)
    quantizers_alone = all(
        isinstance(m, (TensorQuantizer, nn.ModuleList, nn.ModuleDict)) or not _computes(m)
        for m in others
    )
    if isinstance(layer, QuantInputMixin) or quantizers_alone:
        return Site(owner, kind_of(layer), (holder,), layer)
    return Site(holder.name, "quantizer", (holder,))


def _computes(module: nn.Module) -> bool:
    # A quantizer with a learned range holds a Clip.
    return not type(module).__module__.startswith("pytorch_quant.nn.clip")


def _call_of(owner: nn.Module, key: str) -> tuple[str, int]:
    for call, operands in owner.__dict__[SITES].quantized.items():
        if any(key == held for _, held in operands):
            return call
    raise KeyError(key)


def kind_of(layer: nn.Module) -> str:
    """The name of the float layer that a quantized layer stands for."""
    return type(layer).__name__.removeprefix("Quant")
