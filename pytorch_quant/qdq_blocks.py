"""Block quantization as ONNX Q/DQ, while an exporter is running.

QuantizeLinear-21 brought `block_size`: the scale has the shape of the weight with the blocked axis
divided by it. Codes of up to 4 bits are INT4, two to a byte, others INT8 or FP8.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.axes import kept_axes, split_blocks
from pytorch_quant.exporting import written_opset
from pytorch_quant.fake_quant import compute_scale
from pytorch_quant.formats import Format, IntFormat
from pytorch_quant.qdq import check_exportable, positive_scale, untraced
from pytorch_quant.traced_values import value_behind

OPSET = 21
"""The operator set that brought `block_size` and the 4-bit types."""

# onnx.TensorProto.UINT4 and INT4. onnx is not imported by a plain export before it is over.
_UINT4, _INT4 = 21, 22


def quantize_dequantize_blocks(
    x: Tensor, amax: Tensor, axis: int, block_size: int, fmt: Format, *, scale_dtype: torch.dtype
) -> Tensor:
    """Put a Q/DQ pair with `block_size` on a weight into the graph that is being exported.

    Args:
        x: The weight.
        amax: float32, one value, or one for each block in the order of `axes.to_groups`.
        axis: The axis that is cut into blocks.
        block_size: Entries of a block; divides the length of `axis`.
        fmt: The number format.
        scale_dtype: The dtype whose precision the scale has.

    Raises:
        ValueError: `x` is no parameter, the exporter writes an operator set below 21, blocks do not
            divide the axis, or the format has no ONNX form.
    """
    check_exportable(fmt, None)
    check_blocks(x, axis, block_size)
    if torch.jit.is_tracing():
        raise ValueError(
            f"blocks need opset {OPSET}, which torch.onnx.export(..., dynamo=False) does not "
            f"write; use export_onnx, or dynamo=True with opset_version={OPSET}"
        )
    _check_running_export()
    (a,) = kept_axes(axis, x.dim())
    grid = [n // block_size if i == a else n for i, n in enumerate(x.shape)]
    value = value_behind(amax)
    with nullcontext() if value is None else untraced():
        scale = block_scale((amax if value is None else value).detach(), fmt, grid, scale_dtype)
        bounds = [
            (q * scale).repeat_interleave(block_size, a).to(x.dtype) for q in clipped_codes(fmt)
        ]
        scale = scale.to(x.dtype).contiguous()
    for clip, bound in zip((torch.maximum, torch.minimum), bounds, strict=False):
        x = clip(x, bound)
    kind, zero_point = _zero_points(scale, fmt)
    attributes: dict[str, Any] = {"axis": a, "block_size": block_size}
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (x, scale, zero_point),
        attributes,
        dtype=kind,
        shape=x.shape,
        version=OPSET,
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, zero_point),
        attributes,
        dtype=x.dtype,
        shape=x.shape,
        version=OPSET,
    )


def check_blocks(x: Tensor, axis: int | None, block_size: int) -> None:
    """Raise where `x` has no form in blocks.

    Raises:
        ValueError: `x` is no parameter, or blocks do not divide the axis.
    """
    if not isinstance(x, nn.Parameter):
        raise ValueError(
            "a block quantizer has no form for an activation, whose scales would depend on its "
            "shape; use axis=None, or disable this quantizer before the export"
        )
    assert axis is not None
    split_blocks(x, axis, block_size)


def block_scale(amax: Tensor, fmt: Format, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Positive scales in the shape `grid` that ONNX gives them, float32.

    Args:
        amax: float32, one value, or one for each block in the order of `axes.to_groups`.
        fmt: The number format.
        grid: The shape of the weight with the blocked axis divided by the size of a block.
        dtype: The dtype whose precision the scale has.
    """
    scale = positive_scale(compute_scale(amax, fmt, dtype), fmt)
    return scale.reshape(grid) if scale.numel() > 1 else scale.reshape(()).expand(grid)


def clipped_codes(fmt: Format) -> tuple[float, ...]:
    """The lowest and highest code of a grid that is narrower than its ONNX type, else nothing."""
    if isinstance(fmt, IntFormat) and (fmt.narrow or fmt.bits not in (4, 8)):
        return fmt.qmin, fmt.qmax
    return ()


def is_four_bit(fmt: Format) -> bool:
    """Whether the codes are stored two to a byte."""
    return isinstance(fmt, IntFormat) and fmt.bits <= 4


def _zero_points(scale: Tensor, fmt: Format) -> tuple[torch.dtype | int, Tensor]:
    """The type of the codes, and zeros of it for each block."""
    if not is_four_bit(fmt):
        return fmt.storage, torch.zeros_like(scale, dtype=torch.float32).to(fmt.storage)
    kind = _INT4 if fmt.signed else _UINT4
    # torch has no tensors of this type; the exporter folds the Cast.
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    cast = torch.onnx.ops.symbolic(
        "Cast", (zeros,), {"to": kind}, dtype=kind, shape=zeros.shape, version=OPSET
    )
    return kind, cast


def _check_running_export() -> None:
    """Raise where the `torch.onnx.export` that is running was asked for an older operator set.

    It would write the attribute into a file whose operator set does not know it.
    """
    asked = written_opset()
    if asked is not None and asked < OPSET:
        raise ValueError(
            f"blocks need opset {OPSET}, and torch.onnx.export writes {asked}; pass "
            f"opset_version={OPSET}, or use export_onnx"
        )
