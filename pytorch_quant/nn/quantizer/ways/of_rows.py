"""Which way the rows of a block quantizer, or the values of any other, are rounded."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from pytorch_quant.formats import IntFormat
from pytorch_quant.nn.quantizer.entered import Entered
from pytorch_quant.nn.quantizer.ways.codes import Codes
from pytorch_quant.nn.quantizer.ways.learned import Learned
from pytorch_quant.nn.quantizer.ways.static import Static
from pytorch_quant.nn.quantizer.ways.torch_own import TorchOwn

_STATIC, _LEARNED, _CODES, _TORCH_OWN = Static(), Learned(), Codes(), TorchOwn()


class Way(Protocol):
    """What every way can do; it holds nothing, all that it needs is the quantizer's."""

    def enter(self, quantizer: Any, x: Tensor, amax: Tensor | None) -> Entered:
        """What is rounded of `x`, scaled and clipped, with `amax` or the quantizer's own range."""

    def quantize(self, quantizer: Any, entered: Entered) -> Tensor:
        """What the quantizer returns, in the shape that came."""

    def write(self, quantizer: Any, x: Tensor) -> Tensor:
        """The ONNX form on `x`, scaled and clipped, in the graph that is being exported."""


def way_of_rows(quantizer: Any) -> Static:
    """The way of a quantizer whose range does not depend on the tensor, blocks apart."""
    if not quantizer._fake_quant:
        return _CODES
    if quantizer._range_method is not None:
        return _LEARNED
    torch_own = quantizer.use_fb_fake_quant and isinstance(quantizer.format, IntFormat)
    return _TORCH_OWN if torch_own else _STATIC
