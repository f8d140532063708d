"""Pooling layers with a quantized input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pytorch_quant.nn.mixins import QuantInputMixin, pop_quant_desc_in_kwargs

Size = int | tuple[int, ...]


class _QuantPoolMixin(QuantInputMixin):
    """Runs the torch layer on the quantized input."""

    def forward(self, input: Tensor) -> Any:
        """The pooling of the quantized input."""
        return super().forward(self._input_quantizer(input))  # type: ignore[misc]


class _QuantMaxPoolMixin(_QuantPoolMixin):
    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        desc_input = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)  # type: ignore[call-arg]
        self.init_quantizer(desc_input)


class QuantMaxPool1d(_QuantMaxPoolMixin, nn.MaxPool1d):
    """`nn.MaxPool1d` with a quantized input; also takes `quant_desc_input`."""


class QuantMaxPool2d(_QuantMaxPoolMixin, nn.MaxPool2d):
    """`nn.MaxPool2d` with a quantized input; also takes `quant_desc_input`."""


class QuantMaxPool3d(_QuantMaxPoolMixin, nn.MaxPool3d):
    """`nn.MaxPool3d` with a quantized input; also takes `quant_desc_input`."""


class QuantAvgPool1d(_QuantPoolMixin, nn.AvgPool1d):
    """`nn.AvgPool1d` with a quantized input; also takes `quant_desc_input`."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        **kwargs: Any,
    ) -> None:
        desc_input = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad)  # type: ignore[arg-type]
        self.init_quantizer(desc_input)


class _QuantAvgPoolMixin(_QuantPoolMixin):
    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        **kwargs: Any,
    ) -> None:
        desc_input = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(  # type: ignore[call-arg]
            kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
        self.init_quantizer(desc_input)


class QuantAvgPool2d(_QuantAvgPoolMixin, nn.AvgPool2d):
    """`nn.AvgPool2d` with a quantized input; also takes `quant_desc_input`."""


class QuantAvgPool3d(_QuantAvgPoolMixin, nn.AvgPool3d):
    """`nn.AvgPool3d` with a quantized input; also takes `quant_desc_input`."""


class _QuantAdaptiveAvgPoolMixin(_QuantPoolMixin):
    def __init__(self, output_size: Any, **kwargs: Any) -> None:
        desc_input = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(output_size)  # type: ignore[call-arg]
        self.init_quantizer(desc_input)


class QuantAdaptiveAvgPool1d(_QuantAdaptiveAvgPoolMixin, nn.AdaptiveAvgPool1d):
    """`nn.AdaptiveAvgPool1d` with a quantized input; also takes `quant_desc_input`."""


class QuantAdaptiveAvgPool2d(_QuantAdaptiveAvgPoolMixin, nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` with a quantized input; also takes `quant_desc_input`."""


class QuantAdaptiveAvgPool3d(_QuantAdaptiveAvgPoolMixin, nn.AdaptiveAvgPool3d):
    """`nn.AdaptiveAvgPool3d` with a quantized input; also takes `quant_desc_input`."""


MaxPool1d, MaxPool2d, MaxPool3d = QuantMaxPool1d, QuantMaxPool2d, QuantMaxPool3d
AvgPool1d, AvgPool2d, AvgPool3d = QuantAvgPool1d, QuantAvgPool2d, QuantAvgPool3d
AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d = (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAdaptiveAvgPool3d,
)
