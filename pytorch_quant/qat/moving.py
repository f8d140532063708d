"""Ranges that follow the batches of the training."""

from __future__ import annotations

import math

from torch import nn

from pytorch_quant.qat.selection import chosen
from pytorch_quant.qat.undoing import Undo


def update_ranges(
    model: nn.Module,
    momentum: float = 0.99,
    *,
    activations: bool = True,
    weights: bool = False,
    sync: bool = True,
) -> Undo:
    """Let ranges follow what passes in train mode, in place, from now on.

    `amax = momentum * amax + (1 - momentum) * max|x|` before each batch is quantized (Jacob et al.
    2018, section 3.1), with nothing read back to the host; a quantizer without a range starts with
    the maximum of its first batch, one of 0 starts anew. NaN and Inf are passed over. A
    recomputation by a checkpoint does not count. Learned and fixed ranges stay as they are, and in
    eval mode all do.

    In a torch.distributed process group `max|x|` is that of all processes, which therefore run the
    same layers in train mode, in the same order.

    Args:
        model: Holds `TensorQuantizer` modules.
        momentum: 0 (the last batch alone) up to, and not including, 1.
        activations: Those of activations.
        weights: Those of weights; only for ranges that were calibrated with `max`.
        sync: Agree with the other processes in each forward pass.

    Returns:
        `with update_ranges(model):` ends it after the block; else `freeze_ranges` does. The ranges
        stay where they are then.

    Raises:
        ValueError: a momentum out of range, or nothing that could follow.
    """
    if not (math.isfinite(momentum) and 0 <= momentum < 1):
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum!r}")
    found, of_weights = chosen(model, activations, weights, "update_ranges")
    followers = [q for q in found.values() if not q.learns]
    if not followers:
        raise ValueError(
            "update_ranges: all ranges are learned, so that none follows the batches; build the "
            "model anew for moving ranges"
        )
    before = [(q, q.range_momentum, q.range_synced) for q in followers]
    for quantizer in followers:
        # The weights are the same in all processes.
        quantizer.follow_range(momentum, synced=sync and quantizer not in of_weights)

    def undo() -> None:
        for quantizer, held, synced in before:
            quantizer.follow_range(held, synced=synced)

    return Undo(undo)
