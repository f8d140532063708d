"""Quantization with ranges taken at run time, while an ONNX exporter is running.

An activation is ONNX DynamicQuantizeLinear and DequantizeLinear. An LSTM can also be written as
one operator, `com.microsoft.DynamicQuantizeLSTM`, where ONNX Runtime is the target.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytorch_quant.fake_quant import fake_quantize_dynamic
from pytorch_quant.qdq import meant_as_constants


def dynamic_quantize_dequantize(x: Tensor) -> Tensor:
    """Put DynamicQuantizeLinear and DequantizeLinear on `x` into the graph being exported."""
    if torch.jit.is_tracing():
        if x.dtype == torch.float32:
            # Otherwise the tracer records a Cast to what it is.
            return _TracedDynamicQdq.apply(x)
        return _TracedDynamicQdq.apply(x.float()).to(x.dtype)
    codes, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
        "DynamicQuantizeLinear",
        (x.float(),),
        dtypes=(torch.uint8, torch.float32, torch.uint8),
        shapes=(x.shape, (), ()),
    )
    y = torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale, zero_point), dtype=torch.float32, shape=x.shape
    )
    return y.to(x.dtype)


class _TracedDynamicQdq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with meant_as_constants():
            return fake_quantize_dynamic(x)

    @staticmethod
    def symbolic(g: Any, x: Any) -> Any:
        codes, scale, zero_point = g.op("DynamicQuantizeLinear", x, outputs=3)
        y = g.op("DequantizeLinear", codes, scale, zero_point)
        y.setType(x.type())
        return y


class LstmConstants(NamedTuple):
    """What `DynamicQuantizeLSTM` reads besides its inputs and states, for `D` directions.

    Attributes:
        weight: int8 codes of `W_ih`, `(D, I, 4 * H)`.
        recurrence: int8 codes of `W_hh`, `(D, H, 4 * H)`.
        scale: float32, of both, `(D,)` or `(D, 4 * H)`.
        zero_point: int8 zeros in the shape of `scale`.
        bias: float32, `(D, 8 * H)`.
    """

    weight: Tensor
    recurrence: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor


def dynamic_quantize_lstm(
    x: Tensor, state: tuple[Tensor, Tensor] | None, constants: LstmConstants
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Put one layer of an LSTM into the graph being exported, as `DynamicQuantizeLSTM`.

    The operator quantizes the inputs of all time steps with one range, and `h` with a range of its
    own at each step. Its order of gates is that of ONNX LSTM: i, o, f, c.

    Args:
        x: `(T, N, I)`, float32.
        state: `(h, c)`, each `(D, N, H)`; None is zeros.
        constants: The weights.

    Returns:
        The output `(T, N, D * H)`, and the final `(h, c)`.
    """
    weight, recurrence, scale, zero_point, bias = constants
    steps, batch = x.shape[:2]
    directions, hidden = recurrence.shape[:2]
    h, c = (None, None) if state is None else state
    # Left out are the lengths of the sequences, and peepholes.
    inputs = (x, weight, recurrence, bias, None, h, c, None, scale, zero_point, scale, zero_point)
    kept = (directions, batch, hidden)
    y, h, c = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::DynamicQuantizeLSTM",
        inputs,
        {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"},
        dtypes=(x.dtype,) * 3,
        shapes=((steps, directions, batch, hidden), kept, kept),
        version=1,
    )
    if directions == 1:
        return y.squeeze(1), (h, c)
    return y.transpose(1, 2).flatten(2), (h, c)
