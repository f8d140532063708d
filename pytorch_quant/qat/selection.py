"""Which quantizers of a model training is about."""

from __future__ import annotations

import sys

from torch import nn

from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer


def chosen(
    model: nn.Module, activations: bool, weights: bool, wanted_by: str
) -> tuple[dict[str, TensorQuantizer], set[TensorQuantizer]]:
    """The quantizers whose ranges may train, by name, and which of them quantize weights.

    Those that are disabled, dynamic, give integer codes or have a range that their descriptor
    fixes are left out.

    Raises:
        ValueError: neither kind is asked for, or the model has no such quantizer.
    """
    if not (activations or weights):
        raise ValueError(f"{wanted_by}: activations and weights are both false; choose one")
    of_weights = set(weight_quantizers(model))
    found = {
        name: q
        for name, q in named_quantizers(model).items()
        if q.quantizes
        and q.fake_quant
        and not (q.dynamic or q.fixed)
        and (weights if q in of_weights else activations)
    }
    if not found:
        raise ValueError(
            f"{wanted_by}: the model has no quantizer whose range could train; call "
            "quantize(model, example_inputs=...) on it, and enable() what is disabled"
        )
    return found, of_weights


def wrappers(model: nn.Module) -> list[str]:
    """How `model`, or a part of it, is wrapped for several processes."""
    found = []
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        found.append("DistributedDataParallel")
    # Whoever shards has imported it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules()):
        found.append("fully_shard")
    return found
