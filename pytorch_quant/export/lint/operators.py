"""Groups of ONNX operators that rules speak of."""

from __future__ import annotations

QDQ = ("QuantizeLinear", "DequantizeLinear")
CONVOLUTIONS = ("Conv", "ConvTranspose")
WEIGHTED = (*CONVOLUTIONS, "Gemm", "MatMul")
NORMS_AND_CLIPS = ("BatchNormalization", "Relu", "Clip")

# They only move or pick values, so that one scale serves before and behind them. Relu keeps a
# symmetric grid as well.
GRID_PRESERVING = frozenset(
    [
        "MaxPool",
        "Reshape",
        "Flatten",
        "Transpose",
        "Slice",
        "Split",
        "Unsqueeze",
        "Squeeze",
        "Identity",
        "Resize",
        "Relu",
        "Dropout",
        "DepthToSpace",
        "SpaceToDepth",
        "Expand",
    ]
)
POOLS = ("AveragePool", "GlobalAveragePool")
# What a runtime runs on integers if its inputs are.
QUANTIZABLE = frozenset(
    (*WEIGHTED, *POOLS, "Einsum", "Add", "Mul", "ReduceMean", "Concat", "LSTM", "GRU")
)
FLOAT_BY_DEFAULT = frozenset(
    ["Softmax", "LogSoftmax", "LayerNormalization", "Gelu", "Sigmoid", "Swish", "Exp", "Erf", "Div"]
)
COPIES_AND_ACTIVATIONS = GRID_PRESERVING | frozenset(
    [
        "Pad",
        "Tanh",
        "Clip",
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Selu",
        "HardSigmoid",
        "HardSwish",
        "Softplus",
        "Gather",
        "Tile",
    ]
)
