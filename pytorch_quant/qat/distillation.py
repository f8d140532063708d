"""Learning from the float model."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.qat.selection import wrappers


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> Tensor:
    """The loss of knowledge distillation (Hinton et al. 2015, arXiv 1503.02531, section 2).

    `T**2 * KL(softmax(teacher / T) || softmax(student / T))`, mean over the examples; with labels
    `alpha` times that and `1 - alpha` times their cross entropy. `T**2` keeps the size of the
    gradients when T changes.

    Args:
        student_logits: `(N, C)`, or `(N, C, ...)` with classes along axis 1; computed in float32.
        teacher_logits: The same shape; no gradient flows to it.
        labels: What `torch.nn.functional.cross_entropy` takes.
        temperature: T, above 0.
        alpha: The share of the teacher, 0 to 1; without labels it is 1.

    Returns:
        The loss, shape `()`.

    Raises:
        ValueError: shapes that differ, or a number out of range.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() < 2:
        raise ValueError(
            "logits of student and teacher must have one shape (N, C, ...), got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha!r}")
    student = F.log_softmax(_wide(student_logits) / temperature, 1)
    teacher = F.log_softmax(_wide(teacher_logits.detach()) / temperature, 1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean()
    soft = temperature**2 * divergence
    if labels is None:
        return soft
    return alpha * soft + (1 - alpha) * F.cross_entropy(_wide(student_logits), labels)


class Teacher:
    """A frozen float copy of a model as it is now, in eval mode and without gradients.

    It is no module, so that a model may hold it without training or saving it.

    Args:
        model: Quantized or float; the copy does not quantize.

    Raises:
        TypeError: the model is wrapped for several processes.
    """

    def __init__(self, model: nn.Module) -> None:
        around = wrappers(model)
        if around:
            raise TypeError(
                f"a Teacher copies the model itself, got one in {around[0]}; make it before the "
                "model is wrapped"
            )
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.grad = None
        for quantizer in named_quantizers(self.model).values():
            quantizer.disable()

    def to(self, *args: Any, **kwargs: Any) -> Teacher:
        """Move the copy, as `nn.Module.to` does."""
        self.model.to(*args, **kwargs)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the float model gives."""
        with torch.no_grad():
            return self.model(*args, **kwargs)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
