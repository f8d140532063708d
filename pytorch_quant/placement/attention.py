"""Attention written out, so that the probabilities in the middle of it can be quantized."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pytorch_quant import qdq
from pytorch_quant.exporting import exporting_to_onnx

Quantize = Callable[[str, Tensor], Tensor]


def attention(
    quantize: Quantize,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` with every operand of its two products quantized.

    The scale multiplies the query before it is quantized, as TensorRT wants it: a multiplication
    between the first product and the softmax would have to be computed in float.

    Args:
        quantize: Called with `"query"`, `"key"`, `"value"` or `"probabilities"` and the tensor;
            returns what is computed with.
        query: `(..., H, L, E)`.
        key: `(..., H, S, E)`.
        value: `(..., H, S, V)`.
        attn_mask: Boolean, true where attention is paid, or a float that is added to the scores;
            broadcasts to `(..., H, L, S)`.
        dropout_p: The probability of dropping a probability, after it was quantized.
        is_causal: Each position sees those up to its own.
        scale: Of the scores; `1 / sqrt(E)` by default.
        enable_gqa: Several heads of the query share one of key and value.

    Returns:
        `(..., H, L, V)`. A position that may see nothing is 0, except in an ONNX file, where it is
        NaN: one more operator after the softmax would keep runtimes from fusing the attention.

    Raises:
        RuntimeError: `attn_mask` together with `is_causal`.
    """
    if is_causal and attn_mask is not None:
        raise RuntimeError("attention takes attn_mask or is_causal, got both")
    if scale is None:
        # Under the TorchScript tracer sizes are tensors.
        with qdq.meant_as_constants() if torch.jit.is_tracing() else nullcontext():
            scale = float(query.shape[-1]) ** -0.5
    query = quantize("query", query * scale)
    key = quantize("key", key)
    value = quantize("value", value)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1)
    if is_causal:
        sees = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        attn_mask = sees.tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf)
        else:
            scores = scores + attn_mask
    if attn_mask is None or is_causal or exporting_to_onnx():
        probabilities = scores.softmax(-1)
    else:
        blank = (scores == -torch.inf).all(-1, keepdim=True)
        # The first fill keeps NaN out of the gradient.
        probabilities = scores.masked_fill(blank, 0.0).softmax(-1).masked_fill(blank, 0.0)
    probabilities = quantize("probabilities", probabilities)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return probabilities @ value


NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
"""The parameters of the torch function, in their order."""


def bound(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the torch function, all by name."""
    # Of equal lengths: Dynamo of torch 2.8 takes every zip for a strict one.
    return {**dict(zip(NAMES[: len(args)], args, strict=True)), **kwargs}
