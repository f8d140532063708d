"""Which batch norm can be folded into which layer, found in a recorded forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pytorch_quant.axes import Axis, amax_shape, kept_axes
from pytorch_quant.dataflow import Call, Dataflow, Ref
from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.op_kinds import IDENTITIES

_LAYER_OPS = ("conv", "conv_transpose", "linear")
_NORM_TENSORS = ("running_mean", "running_var", "weight", "bias")
# Padding with values of the tensor itself: it commutes with an affine map of each channel.
_COPYING_PADS = ("reflect", "replicate", "circular")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class NotFoldable(Exception):
    """Why a batch norm stays."""


@dataclass(frozen=True)
class NewRange:
    """What a quantizer gets when its tensor changes; its statistics are dropped in any case.

    Attributes:
        name: Its qualified name.
        quantizer: The quantizer.
        axis: The kept axis from now on.
        amax: The new amax; None for a quantizer that is not calibrated.
    """

    name: str
    quantizer: TensorQuantizer
    axis: Axis
    amax: Tensor | None


@dataclass(frozen=True)
class FoldablePair:
    """A layer and the batch norm that becomes a part of it.

    Attributes:
        layer: The qualified name of the layer.
        batch_norm: That of the batch norm.
        follows: Whether the batch norm comes after the layer; else the layer comes after it.
        scale: `gamma / sqrt(var + eps)`, float64, one for each channel.
        shift: `beta - mean * scale`, in the same form.
        ranges: The quantizers that are concerned.
    """

    layer: str
    batch_norm: str
    follows: bool
    scale: Tensor
    shift: Tensor
    ranges: tuple[NewRange, ...]


def find_pairs(
    model: nn.Module, flow: Dataflow
) -> tuple[list[FoldablePair], list[tuple[str, str]]]:
    """The pairs of `model` in the order of the pass that `flow` holds.

    Args:
        model: What was recorded.
        flow: The record.

    Returns:
        The pairs, and the other batch norms with the reason.

    Raises:
        ValueError: NaN or Inf in the tensors of a batch norm or of its layer.
    """
    return _Finder(model, flow).find()


class _Finder:
    def __init__(self, model: nn.Module, flow: Dataflow) -> None:
        self.flow = flow
        self.outputs = set(flow.outputs)
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.quantizers = named_quantizers(model)
        self.weights = weight_quantizers(model)
        self.seen: dict[int, list[str]] = {}
        for quantizer, values in flow.quantizers.items():
            for value in values:
                self.seen.setdefault(value, []).append(quantizer)
        self.owners: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor.numel():
                    self.owners.setdefault(tensor.data_ptr(), []).append(_key(name, key))
        # The calls that take a tensor of a module, and those made while it runs.
        self.uses: dict[str, list[Call]] = {}
        self.inside: dict[str, list[Call]] = {}
        for call in flow.calls:
            self.inside.setdefault(call.module, []).append(call)
            names = [flow.values[value].parameter for value in call.inputs]
            for owner in dict.fromkeys(n.rpartition(".")[0] for n in names if n is not None):
                self.uses.setdefault(owner, []).append(call)

    def find(self) -> tuple[list[FoldablePair], list[tuple[str, str]]]:
        pairs, skipped = [], []
        for name in [n for n, m in self.modules.items() if isinstance(m, _BatchNorm)]:
            try:
                pairs.append(self._pair(name))
            except NotFoldable as reason:
                skipped.append((name, str(reason)))
        return sorted(pairs, key=lambda pair: self.uses[pair.batch_norm][0].index), skipped

    def _pair(self, name: str) -> FoldablePair:
        call, norm = self._norm_call(name), self.modules[name]
        follows, padded = True, False
        between: list[str] = []
        try:
            layer = self._layer_before(call)
        except NotFoldable as before:
            try:
                layer, padded, between = self._layer_after(call)
            except NotFoldable as after:
                raise NotFoldable(f"{before}; {after}") from None
            follows = False
        module = self.modules[layer]
        for owner, part in ((name, norm), (layer, module)):
            for key in _NORM_TENSORS:
                tensor = getattr(part, key, None)
                if tensor is not None and not bool(torch.isfinite(tensor).all()):
                    raise ValueError(
                        f"{owner}: NaN or Inf in its {key}; load a checkpoint without them"
                    )
        scale, shift = _affine(norm)
        concerned = self._weight_quantizers(layer)
        if follows:
            ranges = [_new_range(q, self.quantizers[q], module, scale) for q in concerned]
        else:
            if padded and bool((shift != 0).any()):
                raise NotFoldable(f"{layer} comes after it and pads with zeros, which are shifted")
            ranges = [self._unranged(q, layer) for q in dict.fromkeys([*concerned, *between])]
        return FoldablePair(layer, name, follows, scale, shift, tuple(ranges))

    def _norm_call(self, name: str) -> Call:
        norm = self.modules[name]
        if norm.running_mean is None or norm.running_var is None:
            raise NotFoldable("it has no running statistics (track_running_stats=False)")
        if any(getattr(norm, hooks, None) for hooks in _HOOKS):
            raise NotFoldable("it has hooks, which would be lost; remove them first")
        call = self._only_call(name, _NORM_TENSORS)
        own = [_key(name, k) if getattr(norm, k) is not None else None for k in _NORM_TENSORS]
        held = [call.argument(i + 1, key) for i, key in enumerate(_NORM_TENSORS)]
        inside = [c for m, calls in self.inside.items() if _within(m, name) for c in calls]
        others = [c.site for c in inside if c is not call]
        if call.op != "batch_norm" or self._parameters(held) != own:
            raise NotFoldable(f"{call.site} does not take its tensors as they are")
        if call.module != name:
            raise NotFoldable(f"{call.site} takes its tensors instead of calling it")
        if others:
            raise NotFoldable(f"its forward calls {', '.join(others)} as well")
        if call.argument(5, "training", False):
            raise NotFoldable("it normalizes with the statistics of the batch in eval mode, too")
        return call

    def _layer_call(self, name: str) -> Call:
        layer = self.modules[name]
        call = self._only_call(name, ("weight", "bias"))
        own = [_key(name, "weight"), None if layer.bias is None else _key(name, "bias")]
        held = [call.argument(1, "weight"), call.argument(2, "bias")]
        if call.op not in _LAYER_OPS or self._parameters(held) != own:
            raise NotFoldable(
                f"{call.site} does not take weight and bias of {name} as they are; remove a "
                "parametrization such as weight_norm first"
            )
        if layer.bias is None and call.module != name:
            raise NotFoldable(f"{call.site} takes the weight of {name} and would miss a new bias")
        if any(value in self.seen for value in call.inputs[2:]):
            raise NotFoldable(f"the bias of {name} is quantized")
        return call

    def _only_call(self, name: str, keys: tuple[str, ...]) -> Call:
        """The one call that takes tensors of a module, which it shares with no other."""
        for key in keys:
            tensor = getattr(self.modules[name], key)
            sharing = self.owners.get(tensor.data_ptr(), []) if tensor is not None else []
            if len(sharing) > 1:
                raise NotFoldable(f"{name} shares a tensor: {', '.join(sharing)}")
        calls = self.uses.get(name, [])
        if len(calls) != 1:
            sites = f" ({', '.join(call.site for call in calls)})" if calls else ""
            raise NotFoldable(f"{name} is called {len(calls)} times{sites}")
        return calls[0]

    def _layer_before(self, norm: Call) -> str:
        """The layer whose result `norm` takes, alone."""
        value = _first(norm)
        while value is not None:
            self._check_alone(value, "its input")
            if value in self.seen:
                raise NotFoldable(f"{self.seen[value][0]} quantizes its input")
            call = self.flow.producer(value)
            if call is None:
                break
            if call.op in _LAYER_OPS:
                return self._layer_of(call, value)
            if call.op not in IDENTITIES:
                raise NotFoldable(f"{call.site} comes before it, no layer")
            value = _first(call)
        raise NotFoldable("no call comes before it")

    def _layer_after(self, norm: Call) -> tuple[str, bool, list[str]]:
        """The layer that takes the result of `norm`, alone.

        Returns:
            Its name, whether zeros are put around what it takes, and the quantizers between.
        """
        value, quantizers = norm.outputs[0], []
        while True:
            consumers = self._check_alone(value, "its result")
            if not consumers:
                raise NotFoldable("no call takes its result")
            quantizers += self.seen.get(value, [])
            call = consumers[0]
            if _first(call) == value and call.op in _LAYER_OPS:
                # A transposed convolution sums fewer terms at the border: the same as zeros there.
                padded = call.op == "conv_transpose" or _pads(call)
                return self._layer_of(call, value), padded, quantizers
            copies = call.op == "pad" and call.argument(2, "mode", "constant") in _COPYING_PADS
            if not (copies or call.op in IDENTITIES) or not call.outputs:
                raise NotFoldable(f"{call.site} comes after it, no layer")
            value = call.outputs[0]

    def _check_alone(self, value: int, what: str) -> list[Call]:
        if value in self.outputs:
            raise NotFoldable(f"{what} is an output of the model")
        consumers = self.flow.consumers(value)
        if len(consumers) > 1:
            sites = ", ".join(call.site for call in consumers)
            raise NotFoldable(f"{what} goes to {len(consumers)} places: {sites}")
        return consumers

    def _layer_of(self, call: Call, value: int) -> str:
        """The layer that makes `call`, if axis 1 of `value` holds its channels."""
        weight = self._parameters([call.argument(1, "weight")])[0]
        name = (weight or "").rpartition(".")[0]
        if weight is None or not isinstance(self.modules[name], (_ConvNd, nn.Linear)):
            raise NotFoldable(f"{call.site} takes the weight of no convolution or linear layer")
        if self._layer_call(name) is not call:
            raise NotFoldable(f"{call.site} is not the call of {name}")
        if len(self.flow.values[value].shape) != self.modules[name].weight.dim():
            raise NotFoldable(f"it normalizes an axis that is not the channels of {name}")
        return name

    def _parameters(self, arguments: list[Any]) -> list[str | None]:
        """The names of the parameters and buffers among the arguments of a call."""
        values = self.flow.values
        return [values[a.value].parameter if isinstance(a, Ref) else None for a in arguments]

    def _weight_quantizers(self, layer: str) -> list[str]:
        weight = self.modules[layer].weight
        found = []
        for name, quantizer in self.quantizers.items():
            tensors = self.weights.get(quantizer, [])
            through = {self.flow.values[v].parameter for v in self.flow.quantizers.get(name, ())}
            if _key(layer, "weight") in through or any(t is weight for t in tensors):
                if through - {_key(layer, "weight")} or any(t is not weight for t in tensors):
                    raise NotFoldable(f"{name} quantizes other tensors, too")
                found.append(name)
        return found

    def _unranged(self, name: str, layer: str) -> NewRange:
        quantizer = self.quantizers[name]
        if quantizer.calibrated or quantizer.pre_quant_scale is not None:
            raise NotFoldable(
                f"{layer} comes after it, and the range of {name} would no longer fit; fold before "
                "calibration"
            )
        return NewRange(name, quantizer, quantizer.axis, None)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as `y = x * scale + shift` (Ioffe and Szegedy 2015, algorithm 2)."""
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight.detach().double() * scale
    shift = -norm.running_mean.detach().double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _new_range(name: str, quantizer: TensorQuantizer, layer: Any, scale: Tensor) -> NewRange:
    """The range with which `weight * scale`, channel by channel, has the codes of `weight`."""
    transposed = isinstance(layer, _ConvTransposeNd)
    channel, shape = int(transposed), layer.weight.shape
    axis, amax, block = quantizer.axis, quantizer.amax, quantizer.block_size
    if quantizer.dynamic or quantizer.learns:
        kind = "learned" if quantizer.learns else "dynamic"
        raise NotFoldable(f"{name} has a {kind} range, one for all channels")
    if quantizer.unsigned and bool((scale < 0).any()):
        raise NotFoldable(f"{name} is unsigned, and a scale of it is negative")
    if transposed and layer.groups > 1:
        if amax is None:
            return NewRange(name, quantizer, axis, None)
        raise NotFoldable(
            f"{name}: the weight of a grouped transposed convolution has no axis of output "
            "channels that could have ranges of their own; fold before calibration"
        )
    if axis is None:
        axis = channel
    if amax is None:
        return NewRange(name, quantizer, axis, None)
    kept = kept_axes(axis, len(shape))
    grid = list(amax_shape(shape, axis))
    if block is not None:
        grid = [n // block if a in kept else n for a, n in enumerate(shape)]
    if (channel in kept) == (block is not None):
        what = "a block of it holds several" if block is not None else "it has one for all"
        raise NotFoldable(f"{name} has no range for each output channel: {what}")
    amax = amax.double().expand(grid) if amax.numel() == 1 else amax.double().reshape(grid)
    factor = scale.abs().reshape([-1 if a == channel else 1 for a in range(len(shape))])
    scaled = (amax * factor).float()
    if bool((torch.isinf(scaled)).any()):
        raise NotFoldable(f"{name}: the new amax exceeds the range of float32")
    return NewRange(name, quantizer, axis, scaled if block is None else scaled.reshape(-1, 1))


def _first(call: Call) -> int | None:
    """The value that is the first argument of a call."""
    argument = call.argument(0, "input")
    return argument.value if isinstance(argument, Ref) else None


def _pads(call: Call) -> bool:
    padding = call.argument(4, "padding", 0) if call.op == "conv" else 0
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _key(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
