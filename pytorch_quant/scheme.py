"""`Scheme`: how one layer is quantized, and the presets that users name."""

from __future__ import annotations

from dataclasses import dataclass

from pytorch_quant.descriptor import QuantDescriptor


@dataclass(frozen=True)
class Scheme:
    """Descriptors for the two tensors that a layer multiplies.

    Attributes:
        name: The name of the preset, for tables.
        input: Descriptor of the input activation, or None to leave it float.
        weight: Descriptor of the weight, or None to leave it float. With `per_channel` its `axis`
            is set for each layer by `weight_for`.
        per_channel: Give each output channel of the weight its own amax.
    """

    name: str
    input: QuantDescriptor | None
    weight: QuantDescriptor | None
    per_channel: bool = True

    def weight_for(self, output_axis: int) -> QuantDescriptor | None:
        """The weight descriptor of a layer whose output channels lie on `output_axis`.

        Args:
            output_axis: 0 for convolutions and linear layers, 1 for transposed convolutions.
        """
        if self.weight is None or not self.per_channel:
            return self.weight
        return self.weight.replace(axis=output_axis)


_INT8 = QuantDescriptor(8)

INT8 = Scheme("INT8", _INT8, _INT8)
"""Static int8: per-tensor activations, per-channel weights. What TensorRT runs."""

INT8_PER_TENSOR = Scheme("INT8_PER_TENSOR", _INT8, _INT8, per_channel=False)
"""Static int8 with one amax per weight tensor."""

INT8_DYNAMIC = Scheme("INT8_DYNAMIC", QuantDescriptor(8, dynamic=True), _INT8)
"""Activations ranged at run time (uint8 with a zero point), per-channel int8 weights."""

FP8 = Scheme("FP8", QuantDescriptor((4, 3)), QuantDescriptor((4, 3)), per_channel=False)
"""E4M3, per tensor: the form in which TensorRT runs convolutions in FP8."""

INT4 = Scheme("INT4", _INT8, QuantDescriptor(4))
"""Static int8 activations with int4 weights, one amax per output channel."""

INT4_WEIGHT_ONLY = Scheme(
    "INT4_WEIGHT_ONLY",
    None,
    QuantDescriptor(4, axis=1, block_size=64),
    per_channel=False,
)
"""Linear weights `(N, K)` in int4, one amax for each 64 values along K; float activations."""

PRESETS = {
    scheme.name: scheme
    for scheme in (INT8, INT8_PER_TENSOR, INT8_DYNAMIC, FP8, INT4, INT4_WEIGHT_ONLY)
}
"""The schemes that rules may call by name."""
