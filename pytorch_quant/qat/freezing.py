"""Freezing ranges and batch norm, and undoing it."""

from __future__ import annotations

from typing import Any

from torch import nn

from pytorch_quant.fold import _Frozen
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.qat.learning import range_parameters
from pytorch_quant.qat.undoing import Undo


def freeze_ranges(model: nn.Module) -> Undo:
    """Let no range change in training any more, in place.

    Moving ranges (`update_ranges`) stop; learned ones have `requires_grad=False` and no gradient,
    so that an optimizer passes them over, momentum and all.

    Args:
        model: With moving or learned ranges; freezing it twice is the same as once.

    Returns:
        `with freeze_ranges(model):` undoes it after the block; `unfreeze_ranges` does, too.

    Raises:
        RuntimeError: learned ranges in DistributedDataParallel, which would wait for their
            gradients.
    """
    parameters = [p for p in range_parameters(model).values() if p.requires_grad]
    if parameters:
        _check_wrapper(model)
    moving = [
        (q, q.range_momentum)
        for q in named_quantizers(model).values()
        if q.range_momentum is not None
    ]
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    for quantizer, _ in moving:
        quantizer.follow_range(None)

    def undo() -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for quantizer, momentum in moving:
            quantizer.follow_range(momentum)

    return Undo(undo)


def unfreeze_ranges(model: nn.Module) -> nn.Module:
    """Let the learned ranges of `model` train again, in place.

    Moving ranges move again when `update_ranges` is called.

    Returns:
        `model`.
    """
    for parameter in range_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def unfreeze_batchnorm(model: nn.Module) -> nn.Module:
    """Undo `freeze_batchnorm`, in place: each batch norm follows `model.train()` again.

    Returns:
        `model`; its batch norms are in the mode that it is in.
    """
    for module in model.modules():
        if isinstance(module, _Frozen):
            base: Any = type(module).__bases__[1]
            module.__class__ = base
            module.train(model.training)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze_batchnorm` and, for learned ranges, `freeze_ranges`, in place.

    Returns:
        `model`.
    """
    return unfreeze_ranges(unfreeze_batchnorm(model))


def _check_wrapper(model: nn.Module) -> None:
    for module in model.modules():
        waits = isinstance(module, nn.parallel.DistributedDataParallel)
        if waits and not module.find_unused_parameters:
            raise RuntimeError(
                "freeze_ranges: DistributedDataParallel waits for the gradients of learned "
                "ranges; freeze them before wrapping, wrap with find_unused_parameters=True, or "
                "set the learning rate of their parameter group to 0, as QATSchedule does"
            )
