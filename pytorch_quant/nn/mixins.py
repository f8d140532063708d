"""Mixins that give a layer its quantizers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

PER_TENSOR = QuantDescriptor(8)

_FACTORY_KEYS = ("device", "dtype")


class QuantInputMixin:
    """Adds `_input_quantizer` to a layer that has no weight.

    A layer calls `init_quantizer` once and passes its input through `self._input_quantizer`.
    """

    default_quant_desc_input: QuantDescriptor = PER_TENSOR

    _input_quantizer: TensorQuantizer

    @classmethod
    def set_default_quant_desc_input(cls, value: QuantDescriptor) -> None:
        """Set the input descriptor of instances of this class made from now on.

        Raises:
            ValueError: `value` is no `QuantDescriptor`.
        """
        cls.default_quant_desc_input = _checked_descriptor(value, cls)

    def init_quantizer(self, quant_desc_input: QuantDescriptor) -> None:
        """Make `_input_quantizer`.

        Raises:
            ValueError: the descriptor asks for integer codes.
        """
        self._fake_quant = True
        self._input_quantizer = make_quantizer(self, quant_desc_input)

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """The quantizer of the input."""
        return self._input_quantizer


class QuantMixin(QuantInputMixin):
    """Adds `_input_quantizer` and `_weight_quantizer` to a layer with a weight."""

    default_quant_desc_weight: QuantDescriptor = PER_TENSOR

    _weight_quantizer: TensorQuantizer

    @classmethod
    def set_default_quant_desc_weight(cls, value: QuantDescriptor) -> None:
        """Set the weight descriptor of instances of this class made from now on.

        Raises:
            ValueError: `value` is no `QuantDescriptor`.
        """
        cls.default_quant_desc_weight = _checked_descriptor(value, cls)

    def init_quantizer(  # type: ignore[override]
        self,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
        num_layers: int | None = None,
    ) -> None:
        """Make the quantizers; with `num_layers`, module lists of them in the plural names.

        Raises:
            ValueError: a descriptor asks for integer codes.
        """
        self._fake_quant = True
        if num_layers is None:
            self._input_quantizer = make_quantizer(self, quant_desc_input)
            self._weight_quantizer = make_quantizer(self, quant_desc_weight)
            return
        self._input_quantizers = nn.ModuleList(
            make_quantizer(self, quant_desc_input) for _ in range(num_layers)
        )
        self._weight_quantizers = nn.ModuleList(
            make_quantizer(self, quant_desc_weight) for _ in range(num_layers)
        )

    @property
    def weight_quantizer(self) -> TensorQuantizer:
        """The quantizer of the weight."""
        return self._weight_quantizer

    def weights_to_quantize(self) -> list[tuple[TensorQuantizer, Tensor]]:
        """Each weight quantizer with the very tensor that it sees in forward.

        Calibration reads it, so that weights need no data. A layer that computes what its weight
        quantizer sees overrides this, or returns nothing and is calibrated by the batches.
        """
        return []


class QuantWeightMixin(QuantMixin):
    """For a layer whose weight quantizer sees `weight` as it is."""

    weight: Tensor

    def _quant(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The quantized input and weight; existing programs call it from forwards of their own."""
        return self._input_quantizer(input), self._weight_quantizer(self.weight)

    def weights_to_quantize(self) -> list[tuple[TensorQuantizer, Tensor]]:
        """The weight quantizer with the weight."""
        return [(self._weight_quantizer, self.weight)]


def _checked_descriptor(value: Any, cls: type) -> QuantDescriptor:
    if not isinstance(value, QuantDescriptor):
        raise ValueError(
            f"{cls.__name__}: a default descriptor must be a QuantDescriptor, got {value!r}"
        )
    return value


def make_quantizer(layer: Any, desc: QuantDescriptor) -> TensorQuantizer:
    """A quantizer for `layer`, on the device of its parameters.

    Raises:
        ValueError: `desc` is no `QuantDescriptor`, or asks for integer codes.
    """
    name = type(layer).__name__
    _checked_descriptor(desc, type(layer))
    if not desc.fake_quant:
        raise ValueError(
            f"{name}: Only fake quantization is supported in a layer; got a descriptor with "
            "fake_quant=False. Use a TensorQuantizer by itself for integer codes"
        )
    quantizer = TensorQuantizer(desc)
    parameter = next(layer.parameters(), None) if isinstance(layer, nn.Module) else None
    if parameter is not None:
        quantizer.to(parameter.device)
    return quantizer


def pop_quant_desc_in_kwargs(quant_cls: type, input_only: bool = False, **kwargs: Any) -> Any:
    """Split the descriptors off the keywords of a constructor.

    Args:
        quant_cls: The class whose defaults stand in for what is not given.
        input_only: Return the input descriptor alone.
        **kwargs: `quant_desc_input` and `quant_desc_weight`, nothing else.

    Returns:
        The input descriptor, or the pair of input and weight descriptor. The weight descriptor is
        None for a class that has no default for it.

    Raises:
        TypeError: another keyword (`Unused keys`).
    """
    default_input = getattr(quant_cls, "default_quant_desc_input", PER_TENSOR)
    quant_desc_input = kwargs.pop("quant_desc_input", default_input)
    if input_only:
        _refuse(quant_cls, kwargs)
        return quant_desc_input
    default_weight = getattr(quant_cls, "default_quant_desc_weight", None)
    quant_desc_weight = kwargs.pop("quant_desc_weight", default_weight)
    _refuse(quant_cls, kwargs)
    return quant_desc_input, quant_desc_weight


def pop_factory_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take `device` and `dtype` out of the keywords of a constructor, in place."""
    return {key: kwargs.pop(key) for key in _FACTORY_KEYS if key in kwargs}


def _refuse(quant_cls: type, kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise TypeError(
            f"Unused keys: {', '.join(kwargs)}; {quant_cls.__name__} takes the arguments of the "
            "torch layer, quant_desc_input and quant_desc_weight"
        )
