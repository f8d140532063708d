"""Quantized recurrent layers: LSTM, GRU and the Elman RNN.

The recurrent state is quantized at each time step, so a layer with an active quantizer is a loop
over time; see `nn.rnn_cells` for the step. Under ONNX export the loop unrolls over the number of
time steps of the example input; a dynamic LSTM that is exported for ONNX Runtime is one operator
for each layer (`nn.lstm_operator`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from pytorch_quant import weight_presets
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn.lstm_operator import is_one_operator, run_operators
from pytorch_quant.nn.mixins import QuantMixin, pop_factory_kwargs, pop_quant_desc_in_kwargs
from pytorch_quant.nn.rnn_cells import (
    GRUCell,
    LSTMCell,
    QuantGRUCell,
    QuantLSTMCell,
    QuantRNNCell,
    RNNCell,
    State,
    StepWeights,
    all_idle,
    quantize_inputs,
    take_step,
)
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.nn.weight_cache import quantized_weight

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "QuantGRU",
    "QuantGRUCell",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantRNN",
    "QuantRNNCell",
    "RNNCell",
]


class _QuantRNNMixin(QuantMixin):
    """What the layers share: one pair of quantizers per layer and direction, and the loop.

    `_input_quantizers` and `_weight_quantizers` are module lists with the index
    `layer * num_directions + direction`.
    """

    default_quant_desc_weight = weight_presets.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    _input_quantizers: nn.ModuleList
    _weight_quantizers: nn.ModuleList

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        factory = pop_factory_kwargs(kwargs)
        desc_input, desc_weight = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(*args, **factory)
        self.init_quantizer(desc_input, desc_weight)

    def init_quantizer(  # type: ignore[override]
        self,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
        num_layers: int | None = None,
    ) -> None:
        """Make the module lists of quantizers.

        Args:
            quant_desc_input: How to quantize `[x, h]`.
            quant_desc_weight: How to quantize `[W_ih, W_hh]`.
            num_layers: Length of the lists; by default the layers times the directions.

        Raises:
            ValueError: a descriptor asks for integer codes.
        """
        layer: Any = self
        count = layer.num_layers * self._directions if num_layers is None else num_layers
        super().init_quantizer(quant_desc_input, quant_desc_weight, num_layers=count)

    @property
    def _directions(self) -> int:
        layer: Any = self
        return 2 if layer.bidirectional else 1

    def weights_to_quantize(self) -> list[tuple[TensorQuantizer, Tensor]]:
        """Each weight quantizer with the `[W_ih, W_hh]` of its layer and direction."""
        return [(q, self._weight(i)) for i, q in enumerate(self._weight_quantizers)]  # type: ignore[misc]

    def _weight(self, index: int) -> Tensor:
        layer: Any = self
        return torch.cat(layer.all_weights[index][:2], 1)

    def _step_weights(self, index: int) -> StepWeights:
        layer: Any = self
        rest = layer.all_weights[index][2:]
        bias_ih, bias_hh = rest[:2] if layer.bias else (None, None)
        sources = layer.all_weights[index][:2]
        quantizer: Any = self._weight_quantizers[index]
        weight = quantized_weight(quantizer, lambda: self._weight(index), *sources)
        return StepWeights(weight, bias_ih, bias_hh, rest[-1] if layer.proj_size else None)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """The layer on quantized inputs, states and weights.

        Args:
            input: `(T, N, I)`, `(N, T, I)` with `batch_first`, `(T, I)`, or a `PackedSequence`.
            hx: The initial state as the torch layer takes it; None is zeros.

        Returns:
            The output and the final state, as the torch layer returns them.

        Raises:
            RuntimeError: a shape that does not fit the layer.
            ValueError: an input of the wrong rank or dtype.
        """
        if all_idle((*self._input_quantizers, *self._weight_quantizers)):
            return super().forward(input, hx)  # type: ignore[misc]
        layer: Any = self
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"{layer.mode}: expected a 2-D or 3-D input, got {input.dim()}-D")
        batched = input.dim() == 3
        batch_axis = 0 if layer.batch_first else 1
        x = input if batched else input.unsqueeze(batch_axis)
        starts_from_zeros = hx is None
        if hx is None:
            hx = self._zero_state(x, x.shape[batch_axis])
        elif not batched:
            hx = self._map_state(lambda s: s.unsqueeze(1), hx)
        if not torch.jit.is_tracing():
            # Sizes are tensors there, and comparing them warns.
            layer.check_forward_args(x, hx, None)
        time_axis = 1 - batch_axis
        if is_one_operator(layer):
            output, hx = run_operators(
                layer, x.movedim(time_axis, 0), None if starts_from_zeros else hx
            )
            output = output.movedim(0, time_axis)
        else:
            steps, hx = self._run_layers(list(x.unbind(time_axis)), hx)
            output = torch.stack(steps, time_axis)
        if batched:
            return output, hx
        return output.squeeze(batch_axis), self._map_state(lambda s: s.squeeze(1), hx)

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        layer: Any = self
        data, batch_sizes, to_sorted, from_sorted = packed
        if hx is None:
            hx = self._zero_state(data, int(batch_sizes[0]))
        else:
            hx = layer.permute_hidden(hx, to_sorted)
        layer.check_forward_args(data, hx, batch_sizes)
        steps, hx = self._run_layers(list(data.split(batch_sizes.tolist())), hx, packed=True)
        output = PackedSequence(torch.cat(steps), batch_sizes, to_sorted, from_sorted)
        return output, layer.permute_hidden(hx, from_sorted)

    def _zero_state(self, x: Tensor, batch: int) -> Any:
        layer: Any = self
        count = layer.num_layers * self._directions
        h = x.new_zeros(count, batch, layer.proj_size or layer.hidden_size)
        return (h, x.new_zeros(count, batch, layer.hidden_size)) if layer.mode == "LSTM" else h

    def _map_state(self, change: Any, hx: Any) -> Any:
        return tuple(map(change, hx)) if isinstance(hx, (tuple, list)) else change(hx)

    def _run_layers(
        self, steps: list[Tensor], hx: Any, packed: bool = False
    ) -> tuple[list[Tensor], Any]:
        """All layers on the inputs of the time steps, each `(n, I)`.

        `n` is the batch size; in a packed sequence, the number of sequences that are that long.
        """
        layer: Any = self
        states: State = tuple(hx) if layer.mode == "LSTM" else (hx,)
        finals: list[State] = []
        for depth in range(layer.num_layers):
            if depth and layer.dropout and layer.training:
                dropped = F.dropout(torch.cat(steps), layer.dropout)
                steps = list(dropped.split([len(x) for x in steps]))
            outputs: list[list[Tensor]] = []
            for direction in range(self._directions):
                index = depth * self._directions + direction
                order = -1 if direction else 1
                initial = tuple(s[index] for s in states)
                results, final = self._run_direction(index, steps[::order], initial, packed)
                outputs.append(results[::order])
                finals.append(final)
            steps = outputs[0]
            if len(outputs) == 2:
                steps = [torch.cat(pair, -1) for pair in zip(*outputs, strict=True)]
        stacked = tuple(torch.stack(s) for s in zip(*finals, strict=True))
        return steps, stacked if layer.mode == "LSTM" else stacked[0]

    def _run_direction(
        self, index: int, steps: list[Tensor], state: State, packed: bool
    ) -> tuple[list[Tensor], State]:
        layer: Any = self
        quantizer = self._input_quantizers[index]
        weights = self._step_weights(index)
        outputs = []
        for x in quantize_inputs(quantizer, steps, packed):
            resting: State = ()
            if packed:
                # A sequence that has ended, or in reverse not begun, keeps its state.
                resting = tuple(s[len(x) :] for s in state)
                state = tuple(s[: len(x)] for s in state)
            state = take_step(layer.mode, quantizer, x, state, weights)
            outputs.append(state[0])
            if packed:
                state = tuple(torch.cat(parts) for parts in zip(state, resting, strict=True))
        return outputs, state


class QuantLSTM(_QuantRNNMixin, nn.LSTM):
    """`nn.LSTM` with `[x, h]` quantized at each time step and `[W_ih, W_hh]` quantized per row.

    Takes the arguments of the torch layer, and `quant_desc_input`, `quant_desc_weight`. The
    quantizers are `_input_quantizers` and `_weight_quantizers`, one for each layer and direction.
    With `proj_size`, the projection of `h` is computed in float.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            **kwargs,
        )


class QuantGRU(_QuantRNNMixin, nn.GRU):
    """`nn.GRU` with `[x, h]` quantized at each time step and `[W_ih, W_hh]` quantized per row.

    Takes the arguments of the torch layer, and `quant_desc_input`, `quant_desc_weight`. The
    quantizers are `_input_quantizers` and `_weight_quantizers`, one for each layer and direction.
    The update gate mixes the new value with the float `h`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, **kwargs
        )


class QuantRNN(_QuantRNNMixin, nn.RNN):
    """`nn.RNN` with `[x, h]` quantized at each time step and `[W_ih, W_hh]` quantized per row.

    Takes the arguments of the torch layer, and `quant_desc_input`, `quant_desc_weight`. The
    quantizers are `_input_quantizers` and `_weight_quantizers`, one for each layer and direction.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            **kwargs,
        )


RNN, LSTM, GRU = QuantRNN, QuantLSTM, QuantGRU
