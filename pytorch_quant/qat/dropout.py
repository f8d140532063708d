"""Activations that stay float at random in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.qat.selection import chosen
from pytorch_quant.qat.undoing import Undo


def quantization_dropout(model: nn.Module, p: float = 0.5) -> Undo:
    """Let each value of an activation stay float with probability `p` in train mode, in place.

    QDrop (Wei et al. 2022, arXiv 2203.05740, eq. 5): what a layer learns does not lean on one
    rounding of its input. In eval mode everything is quantized. Another call replaces `p`.

    Args:
        model: Holds quantizers of activations.
        p: 0 (off) to 1 (activations stay float).

    Returns:
        What ends it when it is called, or after the block when it stands in a `with`.

    Raises:
        ValueError: `p` out of range, or no quantizers of activations.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be from 0 to 1, got {p!r}")
    found, _ = chosen(model, True, False, "quantization_dropout")
    for quantizer in found.values():
        hooks = quantizer._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _KeepFloat)]:
            del hooks[key]
    handles = [q.register_forward_hook(_KeepFloat(p)) for q in found.values() if p > 0]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return Undo(undo)


class _KeepFloat:
    """A forward hook; an object, so that models that have it can be copied and pickled."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, quantizer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not (quantizer.training and quantizer.quantizes):
            return None
        x = quantizer.prescaled(*inputs)
        stays = torch.rand_like(x, dtype=torch.float32) < self.p
        return torch.where(stays, x, output)
