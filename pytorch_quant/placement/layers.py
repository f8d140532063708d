"""Layers: modules that are replaced as a whole by their quantized form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The defining modules, because `quant_modules.initialize` replaces the names in torch.nn.
from torch.nn.modules import conv, instancenorm, linear, pooling, rnn

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.float_layers import ConvShape, ProductShape
from pytorch_quant.placement.rules import Choice
from pytorch_quant.scheme import Scheme

WEIGHTED: dict[type, str] = {
    conv.Conv1d: "conv",
    conv.Conv2d: "conv",
    conv.Conv3d: "conv",
    conv.ConvTranspose1d: "conv_transpose",
    conv.ConvTranspose2d: "conv_transpose",
    conv.ConvTranspose3d: "conv_transpose",
    linear.Linear: "linear",
}
"""Layers that multiply their input by a weight."""

AVERAGE_POOLS: dict[type, str] = {
    pooling.AvgPool1d: "avg_pool",
    pooling.AvgPool2d: "avg_pool",
    pooling.AvgPool3d: "avg_pool",
    pooling.AdaptiveAvgPool1d: "adaptive_avg_pool",
    pooling.AdaptiveAvgPool2d: "adaptive_avg_pool",
    pooling.AdaptiveAvgPool3d: "adaptive_avg_pool",
}

RECURRENT: dict[type, str] = {
    rnn.LSTM: "lstm",
    rnn.LSTMCell: "lstm",
    rnn.GRU: "gru",
    rnn.GRUCell: "gru",
    rnn.RNN: "rnn",
    rnn.RNNCell: "rnn",
}

ON_REQUEST: dict[type, str] = {
    pooling.MaxPool1d: "max_pool",
    pooling.MaxPool2d: "max_pool",
    pooling.MaxPool3d: "max_pool",
    instancenorm.InstanceNorm1d: "instance_norm",
    instancenorm.InstanceNorm2d: "instance_norm",
    instancenorm.InstanceNorm3d: "instance_norm",
}
"""Layers that get a quantizer only by a rule that names them or their type."""

PATCHED = ("conv", "conv_transpose", "linear", "lstm", "avg_pool", "adaptive_avg_pool")
"""The kinds that `quant_modules.initialize` replaces."""


@dataclass(frozen=True)
class Layer:
    """A module that is replaced as a whole.

    Attributes:
        name: Its qualified name.
        module: The module.
        op: Its kind.
        group: `weighted`, `average`, `recurrent` or `on request`.
    """

    name: str
    module: nn.Module
    op: str
    group: str

    @property
    def has_weight(self) -> bool:
        """Whether its quantized form has a weight quantizer."""
        return self.group in ("weighted", "recurrent")

    def size_of(self) -> ConvShape | ProductShape | None:
        """What decides whether it pays, as far as the module tells."""
        weight = self.module.weight if self.group == "weighted" else None
        if not isinstance(weight, Tensor):
            return None
        shape = tuple(weight.shape)
        if self.op == "linear":
            return ProductShape(None, shape[1], shape[0])
        if self.op == "conv_transpose":
            return None
        return ConvShape(shape[1], shape[0], shape[2:], int(getattr(self.module, "groups", 1)))

    def weight_axes(self) -> tuple[int | None, int | None, int | None]:
        """The axes of output channels and of the sum, and the length of the latter."""
        if self.group == "recurrent":
            return 0, 1, None
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if self.op == "conv_transpose":
            return (1 if getattr(self.module, "groups", 1) == 1 else None), 0, weight.shape[0]
        return 0, 1, weight.shape[1]


def find_layers(modules: dict[str, nn.Module]) -> dict[str, Layer]:
    """The layers of a model, by name.

    Exact types only: a subclass may do anything in its forward, which a replacement would not do.
    A layer whose weight is computed, and no parameter, is no layer either.
    """
    tables = (
        ("weighted", WEIGHTED),
        ("average", AVERAGE_POOLS),
        ("recurrent", RECURRENT),
        ("on request", ON_REQUEST),
    )
    layers = {}
    for name, module in modules.items():
        for group, table in tables:
            op = table.get(type(module))
            if op is None or "forward" in vars(module):
                continue
            if group == "weighted" and module._parameters.get("weight") is None:
                continue
            layers[name] = Layer(name, module, op, group)
    return layers


def check_scheme(
    site: str, op: str, choice: Choice, placement: str, summed: int | None = None
) -> None:
    """Refuse what a layer or call cannot take.

    Args:
        site: Its name, for messages.
        op: Its kind.
        choice: Its scheme.
        placement: The runtime.
        summed: The length of the axis of the weight that is summed over.

    Raises:
        ValueError: the scheme does not fit.
    """
    scheme = choice.scheme
    if scheme is None:
        return
    x, w = scheme.input, scheme.weight
    if x is not None and x.axis is not None:
        raise ValueError(
            f"{site}: scheme {scheme.name} has one amax per entry of axis {x.axis} of the "
            "activation; runtimes take one per activation tensor (W4): use axis=None"
        )
    for desc in (x, w):
        if desc is not None and not desc.fake_quant:
            raise ValueError(
                f"{site}: scheme {scheme.name} asks for integer codes (fake_quant=False); a layer "
                "takes fake quantization only"
            )
        if desc is not None and desc.unsigned and placement == "tensorrt":
            raise ValueError(
                f"{site}: scheme {scheme.name} is unsigned; TensorRT takes signed codes only (R6)"
            )
    if x is not None and x.dynamic and placement == "tensorrt":
        raise ValueError(
            f"{site}: scheme {scheme.name} ranges activations at run time, which TensorRT does not "
            "do in int8 (R12); use a static scheme, or placement='onnxruntime'"
        )
    if w is not None and w.dynamic:
        raise ValueError(f"{site}: scheme {scheme.name} ranges the weight at run time")
    if w is not None and w.block_size is not None:
        if op not in ("linear", "matmul"):
            raise ValueError(
                f"{site}: scheme {scheme.name} cuts the weight into blocks, which only linear "
                f"layers take, not a {op} (F5); give it another scheme or None"
            )
        if summed is not None and summed % w.block_size:
            raise ValueError(
                f"{site}: scheme {scheme.name} has blocks of {w.block_size}, which do not divide "
                f"its {summed} inputs; give it another scheme or None"
            )


def weight_descriptor(
    scheme: Scheme, output_axis: int | None, summed_axis: int | None
) -> QuantDescriptor | None:
    """The descriptor of a weight.

    Args:
        scheme: The scheme.
        output_axis: The axis of output channels; None is per tensor.
        summed_axis: The axis along which blocks lie.
    """
    weight = scheme.weight
    if weight is None:
        return None
    if weight.block_size is not None:
        return weight if summed_axis is None else weight.replace(axis=summed_axis)
    return weight if output_axis is None else scheme.weight_for(output_axis)


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is compiled by TorchScript, where nothing can be placed."""
    return isinstance(module, torch.jit.ScriptModule)
