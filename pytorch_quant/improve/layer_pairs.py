"""Pairs of layers that scale can be moved between, found in a recorded forward pass."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pytorch_quant.dataflow import Call, Dataflow, Ref
from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.op_kinds import IDENTITIES, RESHAPES

_LAYER_OPS = ("conv", "conv_transpose", "linear")
_ELEMENTWISE = IDENTITIES | {"relu", "leaky_relu", "prelu"}
_POOLS = ("max_pool", "adaptive_max_pool", "avg_pool", "adaptive_avg_pool")


@dataclass(frozen=True)
class LayerPair:
    """Two layers with nothing between them but functions with `f(c x) = c f(x)`, `c > 0`.

    Attributes:
        first: The qualified name of the layer whose outputs are the inputs of the other.
        second: The name of the other.
        repeat: How many successive inputs of `second` hold one channel of `first`.
        quantizers: The names of the quantizers of the activations between them.
    """

    first: str
    second: str
    repeat: int
    quantizers: tuple[str, ...]


def find_pairs(
    model: nn.Module, layers: dict[str, Any], flow: Dataflow
) -> tuple[list[LayerPair], list[tuple[str, str]]]:
    """The pairs among `layers`, in the order of the pass that `flow` holds.

    Every parameter of a pair serves one layer, and each layer one call, so that scale can be moved
    from one to the other.

    Args:
        model: What was recorded.
        layers: Convolutions and linear layers of `model`, by qualified name.
        flow: The record.

    Returns:
        The pairs, and the layers that are the first of none, each with the reason.
    """
    return _Finder(model, layers, flow).find()


class _Unpaired(Exception):
    """Why a layer is the first of no pair."""


class _Finder:
    def __init__(self, model: nn.Module, layers: dict[str, Any], flow: Dataflow) -> None:
        self.layers, self.flow = layers, flow
        self.outputs = set(flow.outputs)
        self.quantizers = named_quantizers(model)
        self.weights = weight_quantizers(model)
        self.owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.numel():
                    self.owners.setdefault(parameter.data_ptr(), []).append(f"{name}.{key}")
        self.seen: dict[int, list[str]] = {}
        for quantizer, values in flow.quantizers.items():
            for value in values:
                self.seen.setdefault(value, []).append(quantizer)
        self.calls: dict[str, list[Call]] = {name: [] for name in layers}
        for call in flow.calls:
            for value in dict.fromkeys(call.inputs):
                owner, _, key = (flow.values[value].parameter or "").rpartition(".")
                if key in ("weight", "bias") and owner in layers and call not in self.calls[owner]:
                    self.calls[owner].append(call)

    def find(self) -> tuple[list[LayerPair], list[tuple[str, str]]]:
        pairs, skipped = [], []
        for name in self.layers:
            try:
                pairs.append(self._pair(name))
            except _Unpaired as reason:
                skipped.append((name, str(reason)))
        order = {name: calls[0].index for name, calls in self.calls.items() if calls}
        return sorted(pairs, key=lambda pair: order[pair.first]), skipped

    def _pair(self, name: str) -> LayerPair:
        call = self._only_call(name)
        value = call.outputs[0]
        channels = self._output_channels(name)
        axis = self._channel_axis(name, value)
        repeat = 1
        quantizers: list[str] = []
        while True:
            quantizers += self.seen.get(value, ())
            follower = self._follower(value)
            if follower.op in _LAYER_OPS:
                second = self._layer_of(follower, value)
                break
            value, axis, repeat = self._through(follower, value, axis, channels, repeat)
        size = self.flow.values[value].shape[axis]
        if axis != self._channel_axis(second, value) or size != channels * repeat:
            raise _Unpaired(f"its channels are not the input channels of {second}")
        self._check_ranges([*quantizers, *self._weight_quantizers(name, second)])
        return LayerPair(name, second, repeat, tuple(dict.fromkeys(quantizers)))

    def _only_call(self, name: str) -> Call:
        calls, layer = self.calls[name], self.layers[name]
        for tensor in (layer.weight, layer.bias):
            others = self.owners.get(tensor.data_ptr(), []) if tensor is not None else []
            if len(others) > 1:
                raise _Unpaired(f"{name} shares a parameter: {', '.join(others)}")
        if len(calls) != 1:
            raise _Unpaired(f"{name} is called {len(calls)} times")
        call = calls[0]
        held = [call.argument(1, "weight"), call.argument(2, "bias")]
        names = [self.flow.values[r.value].parameter if isinstance(r, Ref) else None for r in held]
        prefix = f"{name}." if name else ""
        own = [f"{prefix}weight", None if layer.bias is None else f"{prefix}bias"]
        if call.op not in _LAYER_OPS or names != own:
            raise _Unpaired(
                f"{call.site} does not take weight and bias of {name} as they are; remove a "
                "parametrization such as weight_norm first"
            )
        return call

    def _follower(self, value: int) -> Call:
        if value in self.outputs:
            raise _Unpaired("its output is an output of the model")
        consumers = self.flow.consumers(value)
        if not consumers:
            raise _Unpaired("no torch function takes its output")
        if len(consumers) > 1:
            sites = ", ".join(call.site for call in consumers)
            raise _Unpaired(f"its output goes to {len(consumers)} places: {sites}")
        return consumers[0]

    def _layer_of(self, call: Call, value: int) -> str:
        weight = call.argument(1, "weight")
        if call.argument(0, "input") == Ref(value) and isinstance(weight, Ref):
            owner = (self.flow.values[weight.value].parameter or "").rpartition(".")[0]
            if owner in self.layers and self._only_call(owner) is call:
                return owner
        raise _Unpaired(f"{call.site} follows, which is no convolution or linear layer by itself")

    def _through(
        self, call: Call, value: int, axis: int, channels: int, repeat: int
    ) -> tuple[int, int, int]:
        """The value, the channel axis and the repeats after a call that scales with its input."""
        values = self.flow.values
        if call.op == "batch_norm":
            raise _Unpaired("batch norm between; fold it first (fold_batchnorm)")
        others = [i for i in call.inputs if i != value and values[i].parameter is None]
        if others or call.argument(0, "input") != Ref(value) or not call.outputs:
            raise _Unpaired(f"{call.site} combines its output with other tensors")
        made = call.outputs[0]
        source, shape = values[value].shape, values[made].shape
        if values[made].dtype == values[value].dtype:
            if call.op in _ELEMENTWISE and shape == source:
                return made, axis, repeat
            if call.op in _POOLS and axis < len(source) - _pooled_axes(call):
                return made, axis, repeat
            if call.op == "mean":
                kept = _axis_after_mean(call, len(source), axis)
                if kept is not None:
                    return made, kept, repeat
            if call.op in RESHAPES and len(call.outputs) == 1:
                moved = _reshaped_axis(source, shape, axis, channels, repeat)
                if moved is not None:
                    return made, *moved
        raise _Unpaired(f"{call.site} between does not scale with its input channel by channel")

    def _channel_axis(self, name: str, value: int) -> int:
        spatial = self.layers[name].weight.dim() - 2
        return len(self.flow.values[value].shape) - 1 - spatial

    def _output_channels(self, name: str) -> int:
        layer = self.layers[name]
        return layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features

    def _weight_quantizers(self, *names: str) -> list[str]:
        weights = [self.layers[name].weight for name in names]
        return [
            name
            for name, quantizer in self.quantizers.items()
            if any(seen is weight for seen in self.weights.get(quantizer, ()) for weight in weights)
        ]

    def _check_ranges(self, names: list[str]) -> None:
        for name in names:
            quantizer = self.quantizers[name]
            if quantizer.fixed or quantizer.learns:
                kind = "fixed" if quantizer.fixed else "learned"
                raise _Unpaired(f"{name} has a {kind} range, which would no longer fit")


def _reshaped_axis(
    source: tuple[int, ...], shape: tuple[int, ...], axis: int, channels: int, repeat: int
) -> tuple[int, int] | None:
    """The axis and repeats of the channels after a row-major reshape; None if they are mixed."""
    inner = math.prod(source[axis + 1 :]) * repeat
    for moved in reversed(range(len(shape))):
        behind = math.prod(shape[moved + 1 :])
        if shape[moved] * behind == channels * inner and inner % behind == 0:
            return moved, inner // behind
    return None


def _pooled_axes(call: Call) -> int:
    """How many of the last axes a pooling function works on; more than there are if unknown."""
    found = re.search(r"(\d)d", getattr(call.function, "__name__", ""))
    return int(found[1]) if found else sys.maxsize


def _axis_after_mean(call: Call, rank: int, axis: int) -> int | None:
    """Where the channel axis lies after a mean over other axes; None if the mean takes it."""
    dims = call.argument(1, "dim")
    if dims is None or dims in ((), []):
        return None
    gone = {int(dim) % rank for dim in (dims if isinstance(dims, (tuple, list)) else [dims])}
    if axis in gone:
        return None
    return axis if call.argument(2, "keepdim", False) else axis - sum(dim < axis for dim in gone)
