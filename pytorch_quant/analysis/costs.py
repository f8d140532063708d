"""What a layer costs in bytes and in bit operations under a scheme."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.batches import tensors_in
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.layers import Layer, weight_descriptor
from pytorch_quant.scheme import Scheme

FLOAT_BITS = 32
_SCALE_BITS = 32


def bits_of(descriptor: QuantDescriptor | None, otherwise: int = FLOAT_BITS) -> int:
    """Bits of a code: 8 for int8 and E4M3, 4 for int4 and E2M1."""
    if descriptor is None:
        return otherwise
    bits = descriptor.num_bits
    return 1 + sum(bits) if isinstance(bits, tuple) else bits


def weight_bits(layer: Layer, scheme: Scheme | None) -> int:
    """Bits of the codes and float32 scales of a weight, or of the float weight."""
    weight: Any = layer.module.weight
    if scheme is None or scheme.weight is None:
        return weight.numel() * weight.element_size() * 8
    output_axis, summed_axis, _ = layer.weight_axes()
    descriptor = weight_descriptor(scheme, output_axis, summed_axis)
    assert descriptor is not None
    scales = 1
    if descriptor.block_size is not None:
        scales = weight.numel() // descriptor.block_size
    elif isinstance(descriptor.axis, int):
        scales = weight.shape[descriptor.axis]
    return weight.numel() * bits_of(descriptor) + scales * _SCALE_BITS


def bit_operations(macs: int, scheme: Scheme | None) -> int:
    """`macs * bits of the weight * bits of the activation`; float counts as 32 bits."""
    if scheme is None:
        return macs * FLOAT_BITS * FLOAT_BITS
    return macs * bits_of(scheme.weight) * bits_of(scheme.input)


def model_bits(model: nn.Module) -> int:
    """Bits of all parameters and buffers, each once."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in held.values())


@contextmanager
def counting_macs(layers: dict[str, Layer]) -> Iterator[dict[str, int]]:
    """Multiply-accumulates of each layer, summed over all of its calls in the block."""
    macs = dict.fromkeys(layers, 0)
    handles = []

    def count(name: str, layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            weight: Any = layer.module.weight
            # Shapes alone are read: no call that a frame could count.
            if layer.op == "conv_transpose":
                x = next(tensors_in((args, kwargs)))
                macs[name] += x.numel() * weight.numel() // weight.shape[0]
            else:
                made = sum(tensor.numel() for tensor in tensors_in(output))
                macs[name] += made * weight.numel() // weight.shape[0]

        return hook

    try:
        for name, layer in layers.items():
            hook = count(name, layer)
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        yield macs
    finally:
        for handle in handles:
            handle.remove()


def arguments_of(model: nn.Module, run: Callable[[], Any]) -> Any:
    """What `run` calls the model with, as `quantize` takes its example inputs.

    Raises:
        ValueError: it does not call the model, or in a way that `quantize` cannot repeat.
    """
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, dict(kwargs)))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    if not seen:
        raise ValueError("forward= did not call the model; pass example_inputs= as for quantize()")
    args, kwargs = seen[0]
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else tuple(args)
    if not args:
        return kwargs
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
