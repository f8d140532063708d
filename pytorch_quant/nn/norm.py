"""Instance normalization with a quantized input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pytorch_quant.nn.mixins import QuantInputMixin, pop_factory_kwargs, pop_quant_desc_in_kwargs


class _QuantInstanceNormMixin(QuantInputMixin):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        factory = pop_factory_kwargs(kwargs)
        desc_input = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)  # type: ignore[call-arg]
        self.init_quantizer(desc_input)

    def forward(self, input: Tensor) -> Tensor:
        """The normalization of the quantized input."""
        return super().forward(self._input_quantizer(input))  # type: ignore[misc]


class QuantInstanceNorm1d(_QuantInstanceNormMixin, nn.InstanceNorm1d):
    """`nn.InstanceNorm1d` with a quantized input; also takes `quant_desc_input`."""


class QuantInstanceNorm2d(_QuantInstanceNormMixin, nn.InstanceNorm2d):
    """`nn.InstanceNorm2d` with a quantized input; also takes `quant_desc_input`."""


class QuantInstanceNorm3d(_QuantInstanceNormMixin, nn.InstanceNorm3d):
    """`nn.InstanceNorm3d` with a quantized input; also takes `quant_desc_input`."""


InstanceNorm1d, InstanceNorm2d, InstanceNorm3d = (
    QuantInstanceNorm1d,
    QuantInstanceNorm2d,
    QuantInstanceNorm3d,
)
