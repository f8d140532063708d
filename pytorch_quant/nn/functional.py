"""Functions behind the layers."""

from __future__ import annotations

import torch
from torch import Tensor


def clip(x: Tensor, clip_value_min: Tensor | float, clip_value_max: Tensor | float) -> Tensor:
    """Clamp `x`, with gradients to both bounds where they are tensors.

    Inside the bounds the gradient goes to `x`; outside, its sum goes to the bound that was met,
    as in PACT (Choi et al. 2018, arXiv 1805.06085).

    Args:
        x: Any shape.
        clip_value_min: The lower bound, scalar.
        clip_value_max: The upper bound, scalar.

    Raises:
        ValueError: a bound is not a scalar.
    """
    bounds = []
    for name, bound in (("clip_value_min", clip_value_min), ("clip_value_max", clip_value_max)):
        if isinstance(bound, Tensor):
            if bound.dim() and bound.numel() != 1:
                raise ValueError(f"{name} can only be scalar, got shape {tuple(bound.shape)}")
            bounds.append(bound.to(x.dtype))
        else:
            bounds.append(torch.tensor(bound, dtype=x.dtype, device=x.device))
    low, high = bounds
    # where(), unlike min and max, sends no half gradients at equality.
    return torch.where(x < low, low, torch.where(x > high, high, x))
