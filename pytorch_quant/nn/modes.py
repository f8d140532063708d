"""Finding the quantizers of a model, and switching modes so that they come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pytorch_quant.nn.mixins import QuantMixin
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

_MODES = ("_disabled", "_if_quant", "_if_clip", "_if_calib")


def named_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """The quantizers of `model` by qualified name; a shared one once."""
    return {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
    }


def weight_quantizers(model: nn.Module) -> dict[TensorQuantizer, list]:
    """The quantizers of weights, each with the tensors it sees.

    A layer that does not say what its weight quantizer sees has an empty list here; the batches of
    a calibration show it.
    """
    found: dict[TensorQuantizer, list] = {}
    for module in model.modules():
        for attribute in ("_weight_quantizer", "_weight_quantizers"):
            held = getattr(module, attribute, None)
            if held is not None:
                members = held.modules() if isinstance(held, nn.Module) else ()
                for quantizer in members:
                    if isinstance(quantizer, TensorQuantizer):
                        found.setdefault(quantizer, [])
        if isinstance(module, QuantMixin):
            for quantizer, weight in module.weights_to_quantize():
                found.setdefault(quantizer, []).append(weight)
    return found


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore train/eval and the modes of every quantizer on leaving, whatever happens."""
    training = [(module, module.training) for module in model.modules()]
    modes = [
        (quantizer, {mode: getattr(quantizer, mode) for mode in _MODES})
        for quantizer in named_quantizers(model).values()
    ]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for quantizer, values in modes:
            for mode, value in values.items():
                setattr(quantizer, mode, value)
