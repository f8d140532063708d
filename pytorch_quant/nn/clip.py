"""`Clip`: clamping with bounds that may be trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pytorch_quant.nn import functional


class Clip(nn.Module):
    """Clamp to `[clip_value_min, clip_value_max]`.

    Args:
        clip_value_min: The lower bound, a number.
        clip_value_max: The upper bound, a number.
        learn_min: Make the lower bound a parameter.
        learn_max: Make the upper bound a parameter.

    Raises:
        ValueError: a learned bound is not a scalar.
    """

    def __init__(
        self,
        clip_value_min: float | Tensor,
        clip_value_max: float | Tensor,
        learn_min: bool = False,
        learn_max: bool = False,
    ) -> None:
        super().__init__()
        self.clip_value_min: Tensor
        self.clip_value_max: Tensor
        for name, bound, learned in (
            ("clip_value_min", clip_value_min, learn_min),
            ("clip_value_max", clip_value_max, learn_max),
        ):
            value = torch.as_tensor(bound, dtype=torch.float32).detach().clone()
            if learned:
                if value.numel() != 1:
                    raise ValueError(
                        f"a learned {name} must be scalar, got shape {tuple(value.shape)}"
                    )
                self.register_parameter(name, nn.Parameter(value.reshape(())))
            else:
                self.register_buffer(name, value)

    def forward(self, inputs: Tensor) -> Tensor:
        """Clamp `inputs`; the gradient of each bound is summed over what it clips."""
        return functional.clip(inputs, self.clip_value_min, self.clip_value_max)
