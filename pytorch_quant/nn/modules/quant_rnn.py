"""The recurrent layers under an old module path; see `pytorch_quant.nn.rnn`."""

from pytorch_quant.nn.rnn import (
    GRU,
    LSTM,
    GRUCell,
    LSTMCell,
    QuantGRU,
    QuantGRUCell,
    QuantLSTM,
    QuantLSTMCell,
    QuantRNNCell,
    RNNCell,
)

__all__ = [
    "GRU",
    "LSTM",
    "GRUCell",
    "LSTMCell",
    "QuantGRU",
    "QuantGRUCell",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantRNNCell",
    "RNNCell",
]
