"""Losses of labelled batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pytorch_quant.batches import tensors_in

Loss = Callable[[Any, Any], Tensor]


def target_of(batch: Any, loss: Loss | None, who: str) -> Any:
    """What the loss is given beside the output: the second item of a pair, else the batch.

    Raises:
        ValueError: the batch is no pair, and there is no loss that would know what to do with it.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    if loss is not None:
        return batch
    raise ValueError(
        f"{who} needs labels: batches of (input, target), got a batch of type "
        f"{type(batch).__name__}; or pass loss=lambda output, batch: ... that finds them in it"
    )


def loss_of(output: Any, target: Any, loss: Loss | None, who: str) -> Tensor:
    """The loss of one batch, a tensor of one value.

    Args:
        output: What the model returned.
        target: From `target_of`.
        loss: `loss(output, target)`; None is the cross entropy of `(N, C)` logits.
        who: The function for messages.

    Raises:
        ValueError: there is no loss, and output and target are not logits and classes; or the
            loss is no tensor of one value.
    """
    if loss is not None:
        value = loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{who}: loss must return a tensor of one value, got {got}")
        return value.reshape(())
    classes = isinstance(target, Tensor) and (
        (target.dim() == 1 and not target.is_floating_point())
        or (target.dim() == 2 and target.is_floating_point())
    )
    if isinstance(output, Tensor) and output.dim() == 2 and classes and len(output) == len(target):
        return F.cross_entropy(output.float(), target)
    raise ValueError(
        f"{who}: the default loss is the cross entropy of logits (N, C) and classes (N,), got an "
        f"output {_shape(output)} and a target {_shape(target)}; pass loss=lambda output, target: "
        "..., the mean over the samples of the batch"
    )


def samples_in(target: Any, output: Any) -> int:
    """How many samples a batch has: the length of the first tensor of the target or the output."""
    return next((len(tensor) for tensor in tensors_in((target, output)) if tensor.dim()), 1)


def check_loss(value: Tensor, number: int, who: str) -> None:
    """Check the loss of batch `number` of the float model.

    Raises:
        ValueError: it is NaN or infinite, so that no other loss can be compared with it.
    """
    if not bool(torch.isfinite(value.detach())):
        raise ValueError(
            f"{who}: in float the loss of batch {number} is {value.item()}; look for bad data or "
            "labels in the batch"
        )


def check_samples(samples: int, who: str) -> None:
    """Check that there were samples.

    Raises:
        ValueError: there were none.
    """
    if not samples:
        raise ValueError(f"{who}: the batches hold no samples")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)} and {value.dtype}"
    return f"of type {type(value).__name__}"
