"""Turning a float layer of torch into our quantized one, in place: it stays the same object."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pytorch_quant import nn as quant_nn
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn.mixins import QuantMixin
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

_DIMS = ("1d", "2d", "3d")
_NAMES = (
    *(
        kind + dims
        for kind in (
            "Conv",
            "ConvTranspose",
            "MaxPool",
            "AvgPool",
            "AdaptiveAvgPool",
            "InstanceNorm",
        )
        for dims in _DIMS
    ),
    *("Linear", "LSTM", "LSTMCell", "GRU", "GRUCell", "RNN", "RNNCell"),
)
# torch.nn itself may be patched at the time of the import, torch.nn.modules is not.
QUANTIZED_LAYERS: dict[type, type] = {
    getattr(torch.nn.modules, name): getattr(quant_nn, f"Quant{name}") for name in _NAMES
}
"""The quantized form of each torch layer that has one."""

_UNUSED = QuantDescriptor(8)


def quantized_form(layer: nn.Module) -> type | None:
    """The class that `swap_layer` would give a layer, if any.

    Exact types only: a subclass, or a parametrized layer, may compute something else. The torch
    functions that its forward calls can be quantized instead.
    """
    return QUANTIZED_LAYERS.get(type(layer))


def operands_of(layer: nn.Module) -> tuple[str, ...]:
    """The operands that a layer, or its quantized form, quantizes."""
    form = QUANTIZED_LAYERS.get(type(layer), type(layer))
    return ("input", "weight") if issubclass(form, QuantMixin) else ("input",)


def swap_layer(layer: nn.Module, descriptors: dict[str, QuantDescriptor]) -> None:
    """Change the class of `layer` in place and give it new quantizers.

    Parameters, hooks and all attributes stay the same objects.

    Args:
        layer: A layer that has a `quantized_form`.
        descriptors: How to quantize `"input"` and `"weight"`; one that is missing is disabled.

    Raises:
        ValueError: there is no quantized form, an operand is unknown, or a descriptor asks for
            integer codes.
    """
    form = quantized_form(layer)
    if form is None:
        raise ValueError(
            f"{type(layer).__name__} has no quantized form; quantize the torch functions in its "
            "forward, or leave it float"
        )
    operands = operands_of(layer)
    unknown = [name for name in descriptors if name not in operands]
    if unknown:
        raise ValueError(
            f"{type(layer).__name__} has no operand {unknown[0]!r} to quantize, only "
            f"{' and '.join(operands)}"
        )
    before = set(layer.modules())
    layer.__class__ = form
    quantized: Any = layer
    quantized.init_quantizer(*(descriptors.get(name, _UNUSED) for name in operands))
    for module in set(layer.modules()) - before:
        module.training = layer.training
    for name in set(operands) - set(descriptors):
        for quantizer in quantizers_of(layer, name):
            quantizer.disable()


def quantizers_of(layer: nn.Module, operand: str) -> list[TensorQuantizer]:
    """The quantizers of one operand of a quantized layer; recurrent layers have several."""
    many = getattr(layer, f"_{operand}_quantizers", None)
    if many is not None:
        return list(many)
    one = getattr(layer, f"_{operand}_quantizer", None)
    return [] if one is None else [one]
