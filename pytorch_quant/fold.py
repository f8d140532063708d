"""Batch norm for inference: folded into the layer beside it, or frozen."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from pytorch_quant.dataflow import Dataflow, record
from pytorch_quant.example_inputs import inputs_of_kept_form
from pytorch_quant.fold_pairs import FoldablePair, NotFoldable, find_pairs
from pytorch_quant.placement.call_sites import QUANTIZERS
from pytorch_quant.plain_pass import plain_outputs, same_outputs
from pytorch_quant.tables import aligned


@dataclass(frozen=True)
class FoldedPair:
    """A batch norm that has become a part of a layer.

    Attributes:
        layer: The qualified name of the layer.
        batch_norm: The name of the batch norm, where an `nn.Identity` stands now.
        note: What else has changed; empty for nothing.
    """

    layer: str
    batch_norm: str
    note: str = ""


@dataclass(frozen=True)
class FoldReport:
    """What `fold_batchnorm` did; `print` it for a table.

    Attributes:
        pairs: In the order in which the model runs the batch norms.
        skipped: The batch norms that stay, each with the reason.
    """

    pairs: list[FoldedPair] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("batch norm", "layer", "note")]
        rows += [(pair.batch_norm, pair.layer, pair.note) for pair in self.pairs]
        rows += [(name, "not folded", reason) for name, reason in self.skipped]
        return "\n".join(aligned(rows))


def fold_batchnorm(model: nn.Module, example_inputs: Any = None) -> FoldReport:
    """Make each batch norm a part of the convolution or linear layer beside it, in place.

    In eval mode batch norm is `y = x * s + t` in each channel, with `s = gamma / sqrt(var + eps)`
    and `t = beta - mean * s` (Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 2). Where
    it alone takes the result of a layer, `W' = W * s` in each output channel and `b' = b * s + t`
    give the same in one step (Jacob et al. 2018, section 3.2). Where a layer alone takes the
    result of batch norm, `W' = W * s` in each input channel and `b' = b + sum(W * t)`; unless zeros
    are padded between, which t would have moved, or the layer is calibrated, as its ranges would no
    longer fit.

    The weight stays the same parameter. A layer without bias gets one. An `nn.Identity` takes the
    place of the batch norm; what an optimizer holds of it gets no gradient any more. A model in
    train mode stays so, and is folded with its running statistics nevertheless.

    A calibrated layer keeps its integer codes: amax is multiplied by `|s|`. Where s < 0 they change
    their sign, -128 becomes 127, and a weight that saturates at 127 has -128. Float32 rounding
    moves those at a tie by one step, of weights that do not crowd there less than 1 in 10**5;
    float16 and bfloat16 move more. A weight quantizer with one amax per tensor becomes per-channel,
    and the report says so. Its statistics are dropped. Batch norm stays where the codes would not:
    beside a learned or dynamic range of the weight, and beside a calibrated grouped transposed
    convolution, which has no axis of output channels.

    Pairs are found in one forward pass, from what the model calls and not from names. Another input
    may take another path: where the model has control flow, give an input that takes the path that
    matters. A second call changes nothing more, except for a batch norm behind a folded one.

    Args:
        model: With quantized or float layers, on any device.
        example_inputs: A tensor, a mapping of keywords, or a tuple or list of arguments. A model
            that was placed by `quantize` remembers the form of its inputs and needs none.

    Returns:
        The pairs, and why the other batch norms stay.

    Raises:
        RuntimeError: without a batch norm, the model does not run or does not give the outputs of
            before on `example_inputs`, naming the pair: it uses a tensor between the two where no
            torch function shows it, or is random in a way that torch's seed does not rule. Nothing
            is changed then.
        TypeError: `example_inputs` is of another type.
        ValueError: no `example_inputs`, and the model was not placed by `quantize`; NaN or Inf in
            a layer or its batch norm, naming it.
        Exception: whatever the model raises.
    """
    if example_inputs is None:
        example_inputs = inputs_of_kept_form(model)
    if example_inputs is None:
        raise ValueError(
            "fold_batchnorm finds the layer of each batch norm by running the model, and got no "
            "example_inputs; pass a tensor, or a tuple of arguments, that the model takes"
        )
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return FoldReport()
    return _fold(model, record(model, copy.deepcopy(example_inputs)), example_inputs)


def freeze_batchnorm(model: nn.Module) -> nn.Module:
    """Put every batch norm in eval mode for good, in place.

    Running statistics are used and no longer updated; `model.train()` does not undo it. The affine
    parameters train as before. It is for the last epochs of quantization-aware training, when the
    statistics are to be those that ship. A batch norm without running statistics is left alone.

    The class of a frozen module is a subclass of what it was, so that `isinstance`, checkpoints,
    copies and pickles work.

    Args:
        model: Any model; freezing it twice is the same as once.

    Returns:
        `model`.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            if not isinstance(module, _Frozen):
                base: Any = type(module)
                module.__class__ = _frozen_class(base)
            module.eval()
    return model


# Folding


def _fold(model: nn.Module, flow: Dataflow, example_inputs: Any = None) -> FoldReport:
    """Fold the pairs that `flow` shows; without inputs, the outputs are not compared."""
    pairs, skipped = find_pairs(model, flow)
    done: list[tuple[FoldablePair, _Change]] = []
    checked = bool(pairs) and example_inputs is not None
    expected = plain_outputs(model, example_inputs) if checked else []
    try:
        for pair in pairs:
            try:
                done.append((pair, _Change(model, pair)))
            except NotFoldable as reason:
                skipped.append((pair.batch_norm, str(reason)))
            else:
                done[-1][1].apply()
        if checked:
            _check(model, example_inputs, expected)
    except BaseException as error:
        for _, change in reversed(done):
            change.undo()
        if isinstance(error, _Differs):
            raise _explained(model, [pair for pair, _ in done], example_inputs, expected) from error
        raise
    rows = [FoldedPair(p.layer, p.batch_norm, _note(p, change.new_bias)) for p, change in done]
    for pair, _ in done:
        _set_ranges(pair)
    return FoldReport(rows, skipped)


class _Differs(Exception):
    """The model does not compute what it did."""


class _Change:
    """One pair to fold, that can be undone."""

    def __init__(self, model: nn.Module, pair: FoldablePair) -> None:
        layer: Any = model.get_submodule(pair.layer)
        norm: Any = model.get_submodule(pair.batch_norm)
        self.weight, self.bias = _folded(layer, pair)
        if not all(bool(torch.isfinite(new).all()) for new in (self.weight, self.bias)):
            raise NotFoldable(
                f"weight or bias of {pair.layer} would exceed the range of {layer.weight.dtype}"
            )
        self.layer, self.norm = layer, norm
        self.old_weight, self.new_bias = layer.weight.detach().clone(), layer.bias is None
        self.old_bias = None if layer.bias is None else layer.bias.detach().clone()
        self.places = [
            (parent, key)
            for parent in model.modules()
            if not isinstance(parent, torch.jit.ScriptModule)
            for key, child in parent._modules.items()
            if child is norm
        ]

    @torch.no_grad()
    def apply(self) -> None:
        layer, norm = self.layer, self.norm
        layer.weight.copy_(self.weight)
        if layer.bias is None:
            like = layer.weight if norm.bias is None else norm.bias
            layer.register_parameter("bias", nn.Parameter(self.bias, like.requires_grad))
        else:
            layer.bias.copy_(self.bias)
        # A quantizer of the result stays where it is.
        held = list(norm._modules.get(QUANTIZERS, {}).values())
        identity = held[0] if len(held) == 1 else nn.Identity()
        identity.training = norm.training
        for parent, key in self.places:
            parent._modules[key] = identity

    @torch.no_grad()
    def undo(self) -> None:
        self.layer.weight.copy_(self.old_weight)
        if self.old_bias is None:
            self.layer.register_parameter("bias", None)
        else:
            self.layer.bias.copy_(self.old_bias)
        for parent, key in self.places:
            parent._modules[key] = self.norm


def _folded(layer: Any, pair: FoldablePair) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer with the batch norm in it, in the dtype of the layer."""
    groups, transposed = getattr(layer, "groups", 1), isinstance(layer, _ConvTransposeNd)
    weight = layer.weight.detach().double()
    # (groups, outputs of a group, inputs of a group, kernel)
    grid = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    grid = grid.transpose(1, 2) if transposed else grid
    outputs = grid.shape[1] * groups
    bias = weight.new_zeros(outputs) if layer.bias is None else layer.bias.detach().double()
    if pair.follows:
        bias = bias * pair.scale + pair.shift
        grid = grid * pair.scale.reshape(groups, -1, 1, 1)
    else:
        shift, scale = (x.reshape(groups, 1, -1, 1) for x in (pair.shift, pair.scale))
        bias = bias + (grid * shift).sum((2, 3)).flatten()
        grid = grid * scale
    grid = grid.transpose(1, 2) if transposed else grid
    dtype = layer.weight.dtype
    return grid.reshape(weight.shape).to(dtype), bias.to(dtype)


def _set_ranges(pair: FoldablePair) -> None:
    for new in pair.ranges:
        if new.quantizer.calibrator is not None:
            new.quantizer.calibrator.reset()
        if new.axis != new.quantizer.axis:
            new.quantizer.axis = new.axis
        if new.amax is not None:
            new.quantizer.set_range(new.amax)


def _note(pair: FoldablePair, new_bias: bool) -> str:
    notes = [] if pair.follows else ["the layer comes after the batch norm"]
    notes += ["the layer has a bias now"] * new_bias
    for new in pair.ranges:
        if new.axis != new.quantizer.axis:
            notes.append(f"{new.name} is per channel now (axis {new.axis})")
    return "; ".join(notes)


# Comparing


def _check(model: nn.Module, example_inputs: Any, expected: list[Tensor]) -> None:
    try:
        found = plain_outputs(model, example_inputs)
    except Exception as error:
        raise _Differs(f"the model raises {type(error).__name__}: {error}") from error
    if not same_outputs(expected, found):
        raise _Differs("its outputs are others")


def _explained(
    model: nn.Module, pairs: list[FoldablePair], example_inputs: Any, expected: list[Tensor]
) -> RuntimeError:
    """The error that names the first of `pairs` with which the model differs."""
    done: list[_Change] = []
    try:
        for pair in pairs:
            done.append(_Change(model, pair))
            done[-1].apply()
            try:
                _check(model, example_inputs, expected)
            except _Differs as error:
                return RuntimeError(
                    f"with {pair.batch_norm} folded into {pair.layer}, {error}. It uses the batch "
                    "norm, or the tensor between the two, where no torch function shows it "
                    "(a list of modules, NumPy), or is random beyond torch's seed. Nothing is "
                    "changed"
                )
    finally:
        for change in reversed(done):
            change.undo()
    return RuntimeError(
        "outputs with all batch norms folded are others than before, and not so when folded one "
        "after the other: the model is random beyond torch's seed. Nothing is changed"
    )


# Freezing


class _Frozen(nn.Module):
    """Stands before the class of a batch norm."""

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode."""
        return super().train(False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, where pickle would not find it; its base it does.
        return _restored, (type(self).__bases__[1],), self.__getstate__()


@cache
def _frozen_class(base: type) -> type:
    return type(f"Frozen{base.__name__}", (_Frozen, base), {"__module__": __name__})


def _restored(base: type) -> Any:
    made: Any = _frozen_class(base)
    return made.__new__(made)
