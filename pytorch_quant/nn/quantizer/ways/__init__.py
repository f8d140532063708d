"""The ways of quantizing a tensor, one object for each, with the same methods.

| way | range | what leaves |
|---|---|---|
| `Static` | `amax`, or that of the tensor until it is calibrated | real values |
| `TorchOwn` | the same | real values, computed by torch's own operator |
| `Learned` | the parameter `_amax`, which gets a gradient | real values |
| `Codes` | as `Static` | integer codes |
| `Dynamic` | that of the tensor, with a zero point | real values |
| `Blocks` | one for each block | as one of the first four, which rounds the blocks |

`enter(quantizer, x, amax)` says what is rounded of `x`, which is scaled and clipped, and with which
range; `quantize(quantizer, entered)` rounds it; `write(quantizer, x)` puts the ONNX form in its
place while an exporter runs. A way holds nothing: all that it needs is the quantizer's.
"""

from __future__ import annotations

from typing import Any

from pytorch_quant.formats import IntFormat
from pytorch_quant.nn.quantizer.ways.blocks import Blocks
from pytorch_quant.nn.quantizer.ways.codes import Codes
from pytorch_quant.nn.quantizer.ways.dynamic import Dynamic
from pytorch_quant.nn.quantizer.ways.learned import Learned
from pytorch_quant.nn.quantizer.ways.static import Static
from pytorch_quant.nn.quantizer.ways.torch_own import TorchOwn

_STATIC, _TORCH_OWN, _LEARNED, _CODES = ways = Static(), TorchOwn(), Learned(), Codes()
_STATIC_BLOCKS, _TORCH_OWN_BLOCKS, _LEARNED_BLOCKS, _CODES_BLOCKS = map(Blocks, ways)
_DYNAMIC = Dynamic()


def way_of(quantizer: Any) -> Static | Dynamic | Blocks:
    """The way in which a quantizer quantizes now.

    Asked in every call, as programs set the fields that decide (`quantizer._dynamic`, or
    `use_fb_fake_quant` for the whole class), pickles bring them, and none of that tells the object.
    """
    blocks = quantizer._block_size is not None
    if quantizer._dynamic:
        return _DYNAMIC
    if not quantizer._fake_quant:
        return _CODES_BLOCKS if blocks else _CODES
    if quantizer._range_method is not None:
        return _LEARNED_BLOCKS if blocks else _LEARNED
    if quantizer.use_fb_fake_quant and isinstance(quantizer.format, IntFormat):
        return _TORCH_OWN_BLOCKS if blocks else _TORCH_OWN
    return _STATIC_BLOCKS if blocks else _STATIC
