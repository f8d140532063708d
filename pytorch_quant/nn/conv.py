"""Quantized convolutions and transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from pytorch_quant import weight_presets
from pytorch_quant.nn.mixins import QuantWeightMixin, pop_factory_kwargs, pop_quant_desc_in_kwargs

Size = int | tuple[int, ...]


class _QuantConvMixin(QuantWeightMixin):
    """What the convolutions share: the constructor and the forward pass of the torch layer."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        **kwargs: Any,
    ) -> None:
        factory = pop_factory_kwargs(kwargs)
        desc_input, desc_weight = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            **factory,
        )
        self.init_quantizer(desc_input, desc_weight)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the quantized input with the quantized weight."""
        layer: Any = self
        quant_input, quant_weight = self._quant(input)
        return layer._conv_forward(quant_input, quant_weight, layer.bias)


class QuantConv1d(_QuantConvMixin, nn.Conv1d):
    """`nn.Conv1d` with a quantized input and a weight quantized per output channel.

    Takes the arguments of the torch layer, and `quant_desc_input`, `quant_desc_weight`.
    """

    default_quant_desc_weight = weight_presets.QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL


class QuantConv2d(_QuantConvMixin, nn.Conv2d):
    """`nn.Conv2d` with a quantized input and a weight quantized per output channel.

    Takes the arguments of the torch layer, and `quant_desc_input`, `quant_desc_weight`.
    """

    default_quant_desc_weight = weight_presets.QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL


class QuantConv3d(_QuantConvMixin, nn.Conv3d):
    """`nn.Conv3d` with a quantized input and a weight quantized per output channel.

    Takes the arguments of the torch layer, and `quant_desc_input`, `quant_desc_weight`.
    """

    default_quant_desc_weight = weight_presets.QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL


class _QuantConvTransposeMixin(QuantWeightMixin):
    """What the transposed convolutions share.

    Runtimes take one scale per output channel only where `groups == 1`: a grouped layer falls back
    to one amax per weight tensor, unless `quant_desc_weight` says otherwise.
    """

    _spatial_dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        **kwargs: Any,
    ) -> None:
        factory = pop_factory_kwargs(kwargs)
        chosen = "quant_desc_weight" in kwargs
        desc_input, desc_weight = pop_quant_desc_in_kwargs(type(self), **kwargs)
        falls_back = groups > 1 and not chosen
        if falls_back:
            desc_weight = desc_weight.replace(axis=None)
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            **factory,
        )
        self._per_tensor_for_groups = falls_back
        self.init_quantizer(desc_input, desc_weight)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **keywords: Any
    ) -> None:
        # pytorch_quantization ranged grouped layers per channel as well.
        amax = state_dict.get(f"{prefix}_weight_quantizer._amax")
        fallen_back = self.__dict__.get("_per_tensor_for_groups", False)
        if fallen_back and amax is not None and amax.numel() > 1:
            self._weight_quantizer.axis = 1
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)  # type: ignore[misc]

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The transposed convolution of the quantized input with the quantized weight.

        Args:
            input: `(N, C, ...)` or `(C, ...)`.
            output_size: The spatial size to produce, where the stride leaves a choice.
        """
        layer: Any = self
        output_padding = layer._output_padding(
            input,
            None if output_size is None else list(output_size),
            layer.stride,
            layer.padding,
            layer.kernel_size,
            self._spatial_dims,
            layer.dilation,
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        quant_input, quant_weight = self._quant(input)
        return convolve[self._spatial_dims - 1](
            quant_input,
            quant_weight,
            layer.bias,
            layer.stride,
            layer.padding,
            output_padding,
            layer.groups,
            layer.dilation,
        )


class QuantConvTranspose1d(_QuantConvTransposeMixin, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a quantized input and weight.

    Takes the arguments of the torch layer, and `quant_desc_input`, `quant_desc_weight`. The weight
    `(C, K, R)` is quantized per output channel, axis 1, or per tensor with groups.
    """

    default_quant_desc_weight = weight_presets.QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL
    _spatial_dims = 1


class QuantConvTranspose2d(_QuantConvTransposeMixin, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a quantized input and weight.

    Takes the arguments of the torch layer, and `quant_desc_input`, `quant_desc_weight`. The weight
    `(C, K, R, S)` is quantized per output channel, axis 1, or per tensor with groups.
    """

    default_quant_desc_weight = weight_presets.QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL
    _spatial_dims = 2


class QuantConvTranspose3d(_QuantConvTransposeMixin, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a quantized input and weight.

    Takes the arguments of the torch layer, and `quant_desc_input`, `quant_desc_weight`. The weight
    `(C, K, D, R, S)` is quantized per output channel, axis 1, or per tensor with groups.
    """

    default_quant_desc_weight = weight_presets.QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL
    _spatial_dims = 3


Conv1d, Conv2d, Conv3d = QuantConv1d, QuantConv2d, QuantConv3d
ConvTranspose1d, ConvTranspose2d, ConvTranspose3d = (
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
