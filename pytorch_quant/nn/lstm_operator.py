"""A dynamic LSTM as one operator of ONNX Runtime for each layer, `DynamicQuantizeLSTM`.

The operator quantizes the inputs of all time steps with one range, `h` at each time step with a
range of its own, and takes int8 weights with a scale for each row. `nn.rnn` simulates the same:
measured on layers of 16 to 300 features and up to 50 steps, outputs differ from ONNX Runtime 1.31
by at most 1e-6 as long as it runs in one thread or the batch is 1. With several threads it gives
each one a part of a larger batch, and ranges `h` in each part apart; outputs, which lie between -1
and 1, then differ by up to 0.05 (256 features, batch 8, both directions, 2 threads).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.exporting import exporting_to_onnx
from pytorch_quant.formats import IntFormat
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.qdq import positive_scale
from pytorch_quant.qdq_dynamic import LstmConstants, dynamic_quantize_lstm


@contextmanager
def operator_constants(model: nn.Module) -> Iterator[None]:
    """Let dynamic LSTMs be exported as operators inside: their constants are buffers meanwhile.

    Computed beforehand, the codes need neither be traced nor folded by the exporter, and have the
    name of their layer.

    Args:
        model: Its LSTMs have no `operator_problem`.
    """
    held: list[tuple[Any, str]] = []
    try:
        layers: list[Any] = [m for m in model.modules() if _is_dynamic_lstm(m)]
        for layer in layers:
            # Such a layer is not met, or the export is refused.
            if any(quantizer.needs_amax for quantizer in layer._weight_quantizers):
                continue
            for depth in range(layer.num_layers):
                constants = _constants(layer, depth)
                for name, value in zip(_buffer_names(depth), constants, strict=True):
                    layer.register_buffer(name, value, persistent=False)
                    held.append((layer, name))
        yield
    finally:
        for layer, name in held:
            delattr(layer, name)


def is_one_operator(layer: Any) -> bool:
    """Whether the export that is running wants this layer as operators.

    Args:
        layer: A quantized recurrent layer, `QuantLSTM` or another.
    """
    # The TorchScript exporter unrolls it over time.
    if torch.jit.is_tracing() or not exporting_to_onnx():
        return False
    return all(name in layer._buffers for name in _buffer_names(0))


def operator_problem(module: nn.Module) -> str | None:
    """Why a dynamic LSTM cannot be written as the operator.

    Args:
        module: Any module.

    Returns:
        The reason and what to do, without the name of the layer; None where it can be written, or
        where it is no LSTM with dynamic input quantizers.
    """
    if not _is_dynamic_lstm(module):
        return None
    layer: Any = module
    dynamic = [_is_dynamic(quantizer) for quantizer in layer._input_quantizers]
    fix = "use a static scheme for this LSTM, or leave it float"
    if not all(dynamic):
        return f"some of its input quantizers are dynamic and others are not; {fix}"
    if layer.proj_size:
        return (
            f"DynamicQuantizeLSTM has no projection, and it has proj_size={layer.proj_size}; {fix}"
        )
    if any(weight.dtype != torch.float32 for weight in layer.all_weights[0]):
        return "DynamicQuantizeLSTM takes float32 alone; export model.float()"
    for quantizer in layer._weight_quantizers:
        problem = _weight_problem(quantizer)
        if problem is not None:
            return f"DynamicQuantizeLSTM takes int8 weights, per tensor or per row, and {problem}"
    scaled = (*layer._input_quantizers, *layer._weight_quantizers)
    if any(quantizer.pre_quant_scale is not None for quantizer in scaled):
        return f"DynamicQuantizeLSTM has no pre_quant_scale; {fix}"
    return None


def run_operators(
    layer: Any, x: Tensor, hx: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """All layers of an LSTM, one operator each.

    Args:
        layer: A `QuantLSTM` inside `operator_constants`.
        x: `(T, N, I)`.
        hx: `(h, c)`, each `(layers * directions, N, H)`; None is zeros.

    Returns:
        The output `(T, N, directions * H)`, and the final `(h, c)`.
    """
    count = _directions(layer)
    finals = []
    for depth in range(layer.num_layers):
        part = slice(depth * count, (depth + 1) * count)
        state = None if hx is None else (hx[0][part], hx[1][part])
        constants = LstmConstants(*(getattr(layer, name) for name in _buffer_names(depth)))
        x, final = dynamic_quantize_lstm(x, state, constants)
        finals.append(final)
    if layer.num_layers == 1:
        return x, finals[0]
    h, c = (torch.cat(states) for states in zip(*finals, strict=True))
    return x, (h, c)


def _buffer_names(depth: int) -> tuple[str, ...]:
    return (
        *(f"weight_ih_l{depth}_quantized", f"weight_hh_l{depth}_quantized"),
        *(f"weight_l{depth}_scale", f"weight_l{depth}_zero_point", f"biases_l{depth}"),
    )


@torch.no_grad()
def _constants(layer: Any, depth: int) -> LstmConstants:
    count = _directions(layer)
    parts = [_of_direction(layer, depth * count + i) for i in range(count)]
    weight, recurrence, scale, bias = (torch.stack(part) for part in zip(*parts, strict=True))
    return LstmConstants(weight, recurrence, scale, torch.zeros_like(scale).char(), bias)


def _of_direction(layer: Any, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes `(I, 4 * H)` and `(H, 4 * H)`, scales `()` or `(4 * H,)`, and biases `(8 * H,)`."""
    weight_ih, weight_hh, *biases = layer.all_weights[index]
    quantizer = layer._weight_quantizers[index]
    both = torch.cat((weight_ih, weight_hh), 1)
    entered = quantizer.entering(both)
    scale = positive_scale(entered.scale, entered.format)
    codes = _regated(entered.codes().to(torch.int8))
    parts = [
        part.t().contiguous() for part in codes.split([weight_ih.shape[1], layer.hidden_size], 1)
    ]
    if scale.dim():
        scale = _regated(scale.reshape(-1))
    if not layer.bias:
        biases = [both.new_zeros(len(both))] * 2
    return parts[0], parts[1], scale, torch.cat([_regated(bias) for bias in biases[:2]])


def _regated(rows: Tensor) -> Tensor:
    """Rows in torch's order of gates, i, f, g, o, in that of ONNX LSTM: i, o, f, c."""
    i, f, g, o = rows.chunk(4)
    return torch.cat((i, o, f, g))


def _directions(layer: Any) -> int:
    return 2 if layer.bidirectional else 1


def _is_dynamic_lstm(module: Any) -> bool:
    """A QuantLSTM, or a layer of another module that was given its form."""
    quantizers = getattr(module, "_input_quantizers", ())
    return getattr(module, "mode", None) == "LSTM" and any(map(_is_dynamic, quantizers))


def _is_dynamic(quantizer: Any) -> bool:
    if not isinstance(quantizer, TensorQuantizer):
        return False
    return quantizer.dynamic and quantizer.quantizes


def _weight_problem(quantizer: Any) -> str | None:
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.quantizes:
        return "its weights are float; enable their quantizers, or disable those of the inputs"
    fmt = quantizer.format
    if not isinstance(fmt, IntFormat) or fmt.bits > 8 or not fmt.signed:
        return f"its weights are {fmt.name}; use 8 bits"
    if quantizer.dynamic or quantizer.block_size is not None or quantizer.axis not in (None, 0):
        return f"its weights are quantized otherwise ({quantizer.extra_repr()}); use axis=0"
    return None
