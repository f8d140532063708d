"""The ways of quantizing a tensor, one object for each, with the same methods.

| way | range | what leaves |
|---|---|---|
| `Static` | `amax`, or that of the tensor until it is calibrated | real values |
| `TorchOwn` | the same | real values, computed by torch's own operator |
| `Learned` | the parameter `_amax`, which gets a gradient | real values |
| `Codes` | as `Static` | integer codes |
| `Dynamic` | that of the tensor, with a zero point | real values |
| `Blocks` | one for each block; inside of it one of the first four | as inside |

`enter` says what is rounded and with which range, `quantize` rounds, and `write` puts the ONNX form
in its place while an exporter runs.
"""

from __future__ import annotations

from typing import Any

from pytorch_quant.nn.quantizer.ways.blocks import Blocks
from pytorch_quant.nn.quantizer.ways.dynamic import Dynamic
from pytorch_quant.nn.quantizer.ways.of_rows import Way, way_of_rows

_DYNAMIC, _BLOCKS = Dynamic(), Blocks()


def way_of(quantizer: Any) -> Way:
    """The way in which a quantizer quantizes now.

    Asked in every call, as programs set the fields that decide (`quantizer._dynamic`, or
    `use_fb_fake_quant` for the whole class), pickles bring them, and none of that tells the object.
    """
    if quantizer._dynamic:
        return _DYNAMIC
    return way_of_rows(quantizer) if quantizer._block_size is None else _BLOCKS
