"""Additions, concatenations and matrix products with quantized operands, for hand-written models.

`quantize` places quantizers in such calls by itself. A model that is built from quantized layers
uses these modules in the place of `x + y`, `torch.cat` and `x @ y`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn.mixins import QuantInputMixin, make_quantizer, pop_quant_desc_in_kwargs
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer


class QuantAdd(QuantInputMixin, nn.Module):
    """`x + y` with a quantized residual `y`.

    TensorRT fuses a convolution with the addition behind it, and reads the other operand, the
    residual, in int8: `add(conv(x), x)`. A quantizer on the side of the convolution prevents the
    fusion, so there is none by default. ONNX Runtime and OpenVINO add in int8 where both operands
    are quantized: `quantize_both=True`.

    `_input_quantizer` quantizes `y`; with `quantize_both` `_other_quantizer` quantizes `x`.

    Args:
        quantize_both: Quantize `x` as well.
        quant_desc_other: How `x` is quantized; as `y` if it is None.
        **kwargs: `quant_desc_input`: how `y` is quantized.

    Raises:
        TypeError: another keyword, or `quant_desc_other` without `quantize_both`.
        ValueError: a descriptor is none, or asks for integer codes.
    """

    _other_quantizer: TensorQuantizer | None

    def __init__(
        self,
        quantize_both: bool = False,
        *,
        quant_desc_other: QuantDescriptor | None = None,
        **kwargs: Any,
    ) -> None:
        desc_input = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        if quant_desc_other is not None and not quantize_both:
            raise TypeError(
                f"{type(self).__name__}: quant_desc_other says how x is quantized, and x is only "
                "quantized with quantize_both=True; pass that too, or quant_desc_input for y alone"
            )
        super().__init__()
        self.init_quantizer(desc_input)
        self._other_quantizer = None
        if quantize_both:
            self._other_quantizer = make_quantizer(self, quant_desc_other or desc_input)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum.

        Args:
            x: The result of a convolution, or any tensor that `y` broadcasts with.
            y: The residual.
        """
        if self._other_quantizer is not None:
            x = self._other_quantizer(x)
        return x + self._input_quantizer(y)


class QuantConcat(QuantInputMixin, nn.Module):
    """`torch.cat` of tensors that one quantizer gives one scale.

    With a scale of its own for each, runtimes requantize all of them. `_input_quantizer` quantizes
    each tensor; its range is the largest of theirs. Ranges that are taken at run time
    (`dynamic=True`) are those of each tensor alone.

    Args:
        dim: The dimension along which the tensors are joined.
        **kwargs: `quant_desc_input`.

    Raises:
        TypeError: another keyword.
        ValueError: the descriptor is none, or asks for integer codes.
    """

    def __init__(self, dim: int = 0, **kwargs: Any) -> None:
        desc_input = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__()
        self.dim = dim
        self.init_quantizer(desc_input)

    def forward(self, *tensors: Tensor | Sequence[Tensor]) -> Tensor:
        """The concatenation.

        Args:
            *tensors: The tensors, as arguments or as one list; equal shapes but for `dim`.
        """
        listed: Any = tensors
        if len(tensors) == 1 and not isinstance(tensors[0], Tensor):
            listed = tensors[0]
        return torch.cat([self._input_quantizer(x) for x in listed], self.dim)

    def extra_repr(self) -> str:
        """Such as `dim=1`."""
        return f"dim={self.dim}"


class QuantMatMul(QuantInputMixin, nn.Module):
    """`torch.matmul(x, y)` of two quantized activations, as in attention.

    `_input_quantizer` quantizes `x`, `_other_quantizer` quantizes `y`. A product with a weight is
    `QuantLinear`.

    Args:
        quant_desc_other: How `y` is quantized; as `x` if it is None.
        **kwargs: `quant_desc_input`: how `x` is quantized.

    Raises:
        TypeError: another keyword.
        ValueError: a descriptor is none, or asks for integer codes.
    """

    _other_quantizer: TensorQuantizer

    def __init__(self, *, quant_desc_other: QuantDescriptor | None = None, **kwargs: Any) -> None:
        desc_input = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__()
        self.init_quantizer(desc_input)
        self._other_quantizer = make_quantizer(self, quant_desc_other or desc_input)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The product.

        Args:
            x: The first factor, `(..., n, k)`.
            y: The second factor, `(..., k, m)`.

        Returns:
            `(..., n, m)`.
        """
        return torch.matmul(self._input_quantizer(x), self._other_quantizer(y))
