"""What the fake-quantized model computes: at each quantizer, at each layer, and at its outputs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.batches import copied, tensors_in
from pytorch_quant.export.arguments import tensor_leaves
from pytorch_quant.formats import FloatFormat, IntFormat
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.plain_pass import plain_forward


@dataclass(frozen=True, eq=False)
class QuantizerCall:
    """One tensor that was quantized.

    Attributes:
        x: What reaches QuantizeLinear: clipped and scaled, and within the range of a narrow grid.
        y: What comes out.
        scale: float32, broadcasts against `x`; None for a block quantizer.
        floating: Whether the codes are floating-point numbers.
        order: How many calls of quantizers and layers came before.
    """

    x: Tensor
    y: Tensor
    scale: Tensor | None
    floating: bool
    order: int


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, a module without children other than quantizers.

    Attributes:
        name: Qualified.
        inputs: The tensors among its arguments.
        outputs: The tensors that it returned.
        order: As for `QuantizerCall`.
    """

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    order: int


@dataclass
class Simulation:
    """A pass of the fake-quantized model in eval mode.

    Attributes:
        outputs: The tensors that it returned.
        quantizers: The calls of each enabled quantizer.
        layers: The calls of layers, where they were asked for.
    """

    outputs: list[Tensor]
    quantizers: dict[TensorQuantizer, list[QuantizerCall]]
    layers: list[LayerCall]


def simulate(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, layers: bool = False
) -> Simulation:
    """Run `model` and keep what its quantizers see; it comes back as it was.

    Args:
        model: Calibrated.
        args: Positional arguments.
        kwargs: Keywords.
        layers: Keep what layers take and return as well.
    """
    found = Simulation([], {}, [])
    count = itertools.count()

    def quantizer_hook(quantizer: Any, given: tuple[Tensor, ...], y: Tensor) -> None:
        if quantizer.quantizes:
            x, scale = _seen(quantizer, given[0])
            floating = isinstance(quantizer.format, FloatFormat)
            call = QuantizerCall(_kept(x), _kept(y), scale, floating, next(count))
            found.quantizers.setdefault(quantizer, []).append(call)

    def layer_hook(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: Any, y: Any) -> None:
            order = next(count)
            if layers:
                inputs = [_kept(t) for t in tensors_in([*given, *named.values()])]
                outputs = [_kept(t) for t in tensors_in(y)]
                found.layers.append(LayerCall(name, inputs, outputs, order))

        return hook

    hooks = []
    parts = _parts_of_quantizers(model)
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            hooks.append(module.register_forward_hook(quantizer_hook))
        elif module not in parts and parts.issuperset(module.children()):
            hooks.append(module.register_forward_hook(layer_hook(name), with_kwargs=True))
    try:
        with plain_forward(model, quantized=True):
            found.outputs = [
                _kept(t) for t in tensor_leaves(model(*copied(args), **copied(kwargs)))
            ]
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _kept(tensor: Tensor) -> Tensor:
    # A layer that works in place would write into it.
    return tensor.detach().cpu().clone()


def _parts_of_quantizers(model: nn.Module) -> set[nn.Module]:
    """Quantizers, what lies in them, and modules that hold nothing but them."""
    found = {
        part for q in model.modules() if isinstance(q, TensorQuantizer) for part in q.modules()
    }
    # From the inside out.
    for module in reversed(list(model.modules())):
        children = list(module.children())
        if children and not module._parameters and found.issuperset(children):
            found.add(module)
    return found


def _seen(quantizer: TensorQuantizer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What reaches QuantizeLinear, and the scale there."""
    entered = quantizer.entering(x)
    if quantizer.block_size is not None:
        return entered.x, None
    scale, x = entered.scale, entered.x
    fmt = entered.format
    if isinstance(fmt, IntFormat) and (fmt.narrow or fmt.bits < 8):
        # ONNX has no such type: the file clips, and writes int8.
        x = torch.maximum(x, (fmt.qmin * scale).to(x.dtype))
        x = torch.minimum(x, (fmt.qmax * scale).to(x.dtype))
    return x, scale.cpu()
