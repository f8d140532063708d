"""Quantized recurrent cells, and the time step that they share with the layers of `nn.rnn`.

What is quantized is what enters the matrix products: the concatenation `[x, h]`, with one range,
and the concatenation `[W_ih, W_hh]`, per row. A dynamic quantizer ranges `x` and `h` apart, as
ONNX Runtime's `DynamicQuantizeLSTM` does: `x` of all time steps at once, `h` at each one. Biases,
gates and the state that is carried to the next time step stay float. Were the state of a GRU
rounded where it is carried, an update below half a step would be lost, and the state would stand
still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pytorch_quant import weight_presets
from pytorch_quant.nn.locate import qualified_name
from pytorch_quant.nn.mixins import QuantMixin, pop_factory_kwargs, pop_quant_desc_in_kwargs
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.nn.weight_cache import quantized_weight

State = tuple[Tensor, ...]
"""`(h, c)` of an LSTM, `(h,)` of the others."""


class StepWeights(NamedTuple):
    """The weights of one layer and direction, for `I` input and `H` hidden features.

    Attributes:
        weight: Quantized `[W_ih, W_hh]`, `(gates * H, I + H)`.
        bias_ih: `(gates * H,)` or None.
        bias_hh: `(gates * H,)` or None.
        weight_hr: The projection of `h` of an LSTM with `proj_size`, `(proj_size, H)`, float.
    """

    weight: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None = None


# The gates are written out instead of calling torch's cell functions: one product with [x, h] is
# at least as fast, exports as one quantized matrix product, and takes a projected h.


def _linear(inputs: Tensor, weights: StepWeights) -> Tensor:
    bias = weights.bias_ih
    if bias is not None and weights.bias_hh is not None:
        bias = bias + weights.bias_hh
    return F.linear(inputs, weights.weight, bias)


def _lstm_step(inputs: Tensor, state: State, weights: StepWeights) -> State:
    i, f, g, o = _linear(inputs, weights).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if weights.weight_hr is None else F.linear(h, weights.weight_hr)), c


def _gru_step(inputs: Tensor, state: State, weights: StepWeights) -> State:
    (h,) = state
    hidden = weights.weight.shape[0] // 3
    sizes = [weights.weight.shape[1] - hidden, hidden]
    quantized_x, quantized_h = inputs.split(sizes, -1)
    weight_ih, weight_hh = weights.weight.split(sizes, 1)
    # The reset gate acts on the product with h alone, so the two products stay apart.
    from_x = F.linear(quantized_x, weight_ih, weights.bias_ih)
    from_h = F.linear(quantized_h, weight_hh, weights.bias_hh)
    (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, -1), from_h.chunk(3, -1)
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (n + (z_x + z_h).sigmoid() * (h - n),)


def _rnn_tanh_step(inputs: Tensor, state: State, weights: StepWeights) -> State:
    return (_linear(inputs, weights).tanh(),)


def _rnn_relu_step(inputs: Tensor, state: State, weights: StepWeights) -> State:
    return (_linear(inputs, weights).relu(),)


STEPS: dict[str, Callable[[Tensor, State, StepWeights], State]] = {
    "LSTM": _lstm_step,
    "GRU": _gru_step,
    "RNN_TANH": _rnn_tanh_step,
    "RNN_RELU": _rnn_relu_step,
}
"""The equations of the torch documentation, by the `mode` of `nn.RNNBase`."""


def ranges_apart(quantizer: nn.Module) -> bool:
    """Whether `x` and `h` have ranges of their own: those of a dynamic quantizer."""
    if not isinstance(quantizer, TensorQuantizer):
        return False
    # A factor for each column of [x, h] needs the two together.
    return quantizer.dynamic and quantizer.pre_quant_scale is None


def quantize_inputs(
    quantizer: nn.Module, steps: list[Tensor], packed: bool = False
) -> list[Tensor]:
    """The inputs of all time steps as `take_step` wants them.

    Args:
        quantizer: The input quantizer.
        steps: Each `(n, I)`.
        packed: `n` differs between them.

    Returns:
        The inputs, quantized with one range if `x` and `h` are ranged apart.
    """
    if not ranges_apart(quantizer):
        return steps
    if packed:
        return list(quantizer(torch.cat(steps)).split([len(x) for x in steps]))
    return list(quantizer(torch.stack(steps)).unbind())


def take_step(
    mode: str, quantizer: nn.Module, x: Tensor, state: State, weights: StepWeights
) -> State:
    """One time step on quantized `[x, h]`.

    Args:
        mode: A key of `STEPS`.
        quantizer: The input quantizer.
        x: `(N, I)`, from `quantize_inputs`.
        state: Each `(N, H)`; `h` is `(N, proj_size)` with a projection.
        weights: The weights of the layer and direction.

    Returns:
        The next state; its first tensor is the output.
    """
    if ranges_apart(quantizer):
        inputs = torch.cat((x, quantizer(state[0])), -1)
    else:
        inputs = quantizer(torch.cat((x, state[0]), -1))
    return STEPS[mode](inputs, state, weights)


def all_idle(quantizers: Iterable[nn.Module]) -> bool:
    """Whether every quantizer passes its input on as it is."""
    return all(
        isinstance(q, TensorQuantizer)
        and q.pre_quant_scale is None
        and not (q.collects or q.clips or q.quantizes)
        for q in quantizers
    )


class _QuantCellMixin(QuantMixin):
    """What the cells share."""

    default_quant_desc_weight = weight_presets.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        factory = pop_factory_kwargs(kwargs)
        desc_input, desc_weight = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(*args, **factory)
        self.init_quantizer(desc_input, desc_weight)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One time step.

        Args:
            input: `(N, I)` or `(I,)`.
            hx: The state as the torch cell takes it; None is zeros.

        Returns:
            The next state, as the torch cell returns it.

        Raises:
            RuntimeError: a shape that does not fit the cell.
        """
        if all_idle((self._input_quantizer, self._weight_quantizer)):
            return super().forward(input, hx)  # type: ignore[misc]
        cell: Any = self
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        mode = self._mode()
        if hx is None:
            zeros = x.new_zeros(x.shape[0], cell.hidden_size)
            state: State = (zeros, zeros) if mode == "LSTM" else (zeros,)
        else:
            state = tuple(hx) if mode == "LSTM" else (hx,)
            state = state if batched else tuple(s.unsqueeze(0) for s in state)
        self._check_shapes(x, state)
        sources = cell.weight_ih, cell.weight_hh
        weight = quantized_weight(self._weight_quantizer, lambda: torch.cat(sources, 1), *sources)
        weights = StepWeights(weight, cell.bias_ih, cell.bias_hh)
        (x,) = quantize_inputs(self._input_quantizer, [x])
        state = take_step(mode, self._input_quantizer, x, state, weights)
        state = state if batched else tuple(s.squeeze(0) for s in state)
        return state if mode == "LSTM" else state[0]

    def _mode(self) -> str:
        raise NotImplementedError

    def _check_shapes(self, x: Tensor, state: State) -> None:
        cell: Any = self
        if torch.jit.is_tracing():
            # Sizes are tensors there, and comparing them warns.
            return
        # After the concatenation two wrong sizes could add up to the right one.
        if x.dim() != 2 or x.shape[1] != cell.input_size:
            raise RuntimeError(
                f"{qualified_name(cell)}: expected an input of shape (N, {cell.input_size}) or "
                f"({cell.input_size},), got {tuple(x.shape)} with the batch axis"
            )
        expected = (x.shape[0], cell.hidden_size)
        for s in state:
            if s.shape != expected:
                raise RuntimeError(
                    f"{qualified_name(cell)}: expected a state of shape {expected}, got "
                    f"{tuple(s.shape)} with the batch axis"
                )

    def weights_to_quantize(self) -> list[tuple[TensorQuantizer, Tensor]]:
        """The weight quantizer with `[W_ih, W_hh]`."""
        cell: Any = self
        return [(self._weight_quantizer, torch.cat((cell.weight_ih, cell.weight_hh), 1))]


class QuantRNNCell(_QuantCellMixin, nn.RNNCell):
    """`nn.RNNCell` with a quantized `[x, h]` and a weight `[W_ih, W_hh]` quantized per row.

    Takes the arguments of the torch cell, and `quant_desc_input`, `quant_desc_weight`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, **kwargs)

    def _mode(self) -> str:
        return f"RNN_{self.nonlinearity.upper()}"


class QuantLSTMCell(_QuantCellMixin, nn.LSTMCell):
    """`nn.LSTMCell` with a quantized `[x, h]` and a weight `[W_ih, W_hh]` quantized per row.

    Takes the arguments of the torch cell, and `quant_desc_input`, `quant_desc_weight`.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(input_size, hidden_size, bias, **kwargs)

    def _mode(self) -> str:
        return "LSTM"


class QuantGRUCell(_QuantCellMixin, nn.GRUCell):
    """`nn.GRUCell` with a quantized `[x, h]` and a weight `[W_ih, W_hh]` quantized per row.

    Takes the arguments of the torch cell, and `quant_desc_input`, `quant_desc_weight`. The update
    gate mixes the new value with the float `h`.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(input_size, hidden_size, bias, **kwargs)

    def _mode(self) -> str:
        return "GRU"


RNNCell, LSTMCell, GRUCell = QuantRNNCell, QuantLSTMCell, QuantGRUCell
