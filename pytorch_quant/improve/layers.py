"""The layers that post-training improvement works on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pytorch_quant.nn.mixins import QuantWeightMixin


def weighted_layers(model: nn.Module) -> dict[str, Any]:
    """The quantized convolutions and linear layers of `model`, by qualified name, each once.

    Raises:
        ValueError: there are none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantWeightMixin) and isinstance(module, (_ConvNd, nn.Linear))
    }
    if not found:
        raise ValueError(
            "the model has no quantized convolution or linear layer; call "
            "quant_modules.initialize() before it is built"
        )
    return found


def repeatable(batches: Iterable[Any], who: str) -> Iterable[Any]:
    """`batches`, once it is sure that it can be run through more than once.

    Raises:
        TypeError: it is an iterator, which is empty after one pass.
    """
    if iter(batches) is batches:
        raise TypeError(
            f"{who} runs through the batches more than once, and got a "
            f"{type(batches).__name__}, which is empty after one pass; pass a list or a loader"
        )
    return batches
