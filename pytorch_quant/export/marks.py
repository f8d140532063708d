"""Marks where Q/DQ pairs stand, and what `export_onnx` writes in their place.

The current exporter traces a quantizer as one operator, `pytorch_quant::pair`, whose translation
puts QuantizeLinear and DequantizeLinear with constant scales there. The arithmetic that makes a
scale of an amax is then neither traced nor folded, which is a large part of an export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pytorch_quant import axes
from pytorch_quant.export.int4 import packed
from pytorch_quant.exporting import exporting_to_onnx
from pytorch_quant.fake_quant import compute_scale
from pytorch_quant.formats import Format, IntFormat
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.nn.quantizer.interception import Handler, Proceed
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.qdq import positive_scale
from pytorch_quant.qdq_blocks import block_scale, check_blocks, clipped_codes, is_four_bit

_library = torch.library.Library("pytorch_quant", "FRAGMENT")
_library.define("pair(Tensor x, str key) -> Tensor")
# Tracing needs the shape alone; the mark never runs.
_library.impl("pair", lambda x, key: torch.empty_like(x), "CompositeExplicitAutograd")
torch.library.register_fake("pytorch_quant::pair", lambda x, key: torch.empty_like(x))


@dataclass(frozen=True)
class HeldRange:
    """What the pair of one quantizer is made of.

    Attributes:
        amax: float32 on the CPU, shape `()` or one value for each entry of `axis`.
        axis: The kept axis, None per tensor; with `block_size` the axis that is cut into blocks.
        format: The number format.
        block_size: Entries of a block, each with a value of `amax` in the order of
            `axes.to_groups`.
    """

    amax: Tensor
    axis: int | None
    format: Format
    block_size: int | None = None


@contextmanager
def marked_pairs(model: nn.Module) -> Iterator[dict[Any, Callable[..., Any]]]:
    """Let the quantizers of `model` put marks into the graph that is exported in this block.

    Those without a range of their own, such as dynamic ones, write themselves as ever.

    Yields:
        The `custom_translation_table` that writes pairs in place of the marks.
    """
    ranges: dict[str, HeldRange] = {}
    with ExitStack() as stack:
        for name, quantizer in named_quantizers(model).items():
            held = _held(quantizer)
            if held is not None:
                ranges[name] = held
                stack.enter_context(quantizer.intercepted(_marking(quantizer, name, held)))
        yield {torch.ops.pytorch_quant.pair.default: _translation(ranges)}


def _held(quantizer: TensorQuantizer) -> HeldRange | None:
    amax = quantizer.amax_in_use
    writes = quantizer.quantizes and quantizer.fake_quant and not quantizer.dynamic
    if not writes or amax is None:
        return None
    amax = amax.detach().cpu()
    block_size, axis = quantizer.block_size, quantizer.axis
    if block_size is None and amax.numel() == 1:
        return HeldRange(amax.reshape(()), None, quantizer.format)
    if block_size is None:
        axis = axes.varying_axis(amax.shape, axis)
    return HeldRange(amax, axis, quantizer.format, block_size) if isinstance(axis, int) else None


def _marking(quantizer: TensorQuantizer, key: str, held: HeldRange) -> Handler:
    def mark(x: Tensor, proceed: Proceed) -> Tensor:
        if not exporting_to_onnx():
            return proceed(x)
        x = quantizer.reaching(x)
        try:
            _check_fits(x, held, quantizer.axis)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        return torch.ops.pytorch_quant.pair(x, key)

    return mark


def _check_fits(x: Tensor, held: HeldRange, axis: axes.Axis) -> None:
    if held.block_size is None:
        axes.kept_axes(axis, x.dim())
    if held.block_size is not None:
        check_blocks(x, held.axis, held.block_size)
    elif held.axis is not None and x.shape[held.axis] != held.amax.numel():
        raise ValueError(
            f"an amax of shape {tuple(held.amax.shape)} does not fit an input of shape "
            f"{tuple(x.shape)} with axis={held.axis}; calibrate again"
        )


def _translation(ranges: dict[str, HeldRange]) -> Callable[[Any, str], Any]:
    # The exporter asks for the name of the function.
    def pair(x: Any, key: str) -> Any:
        return _pair(x, ranges[key])

    return pair


def _pair(x: Any, held: HeldRange) -> Any:
    """The nodes of one pair, as the exporter records them."""
    from onnxscript import opset18

    # Its annotations have no type for a tensor that an exporter records.
    op: Any = opset18
    if held.block_size is not None:
        return _block_pair(x, held, held.block_size)
    fmt = held.format
    dtype = getattr(torch, _TORCH_NAMES.get(x.dtype.name, "float32"))
    rank = len(x.shape)
    scale = positive_scale(compute_scale(held.amax, fmt, dtype), fmt)
    if isinstance(fmt, IntFormat) and (fmt.narrow or fmt.bits < 8):
        low, high = (
            op.Constant(value=tensor_proto((code * scale).to(dtype)))
            for code in (fmt.qmin, fmt.qmax)
        )
        # One node where it can be, for the reason given in qdq.
        x = op.Min(op.Max(x, low), high) if scale.dim() else op.Clip(x, low, high)
    scale = scale.reshape(() if held.axis is None else -1).to(dtype)
    attributes = {} if held.axis is None else {"axis": held.axis % rank}
    zero_point = torch.zeros(scale.shape).to(fmt.storage)
    constants = [op.Constant(value=tensor_proto(value)) for value in (scale, zero_point)]
    codes = op.QuantizeLinear(x, *constants, **attributes)
    return op.DequantizeLinear(codes, *constants, **attributes)


def _block_pair(x: Any, held: HeldRange, block_size: int) -> Any:
    import onnx
    from onnxscript import opset21

    op: Any = opset21
    fmt, axis = held.format, (held.axis or 0) % len(x.shape)
    dtype = getattr(torch, _TORCH_NAMES.get(x.dtype.name, "float32"))
    grid = [n // block_size if a == axis else n for a, n in enumerate(x.shape)]
    scale = block_scale(held.amax, fmt, grid, dtype)
    for clip, q in zip((op.Max, op.Min), clipped_codes(fmt), strict=False):
        limit = (q * scale).repeat_interleave(block_size, axis).to(dtype)
        x = clip(x, op.Constant(value=tensor_proto(limit)))
    if is_four_bit(fmt):
        kind = onnx.TensorProto.INT4 if fmt.signed else onnx.TensorProto.UINT4
        zero_point = packed(np.zeros(grid, np.int8), kind)
    else:
        zero_point = tensor_proto(torch.zeros(grid).to(fmt.storage))
    constants = [op.Constant(value=v) for v in (tensor_proto(scale.to(dtype)), zero_point)]
    codes = op.QuantizeLinear(x, *constants, axis=axis, block_size=block_size)
    return op.DequantizeLinear(codes, *constants, axis=axis, block_size=block_size)


_TORCH_NAMES = {"FLOAT16": "float16", "BFLOAT16": "bfloat16"}


def tensor_proto(value: Tensor) -> Any:
    """A tensor as an `onnx.TensorProto`, of types that NumPy lacks as well."""
    import onnx
    from torch.onnx import JitScalarType

    kind = JitScalarType.from_dtype(value.dtype).onnx_type()
    raw = np.asarray(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)).tobytes()
    return onnx.TensorProto(data_type=kind.value, dims=list(value.shape), raw_data=raw)
