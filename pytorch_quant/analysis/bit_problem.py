"""Measured layers and a budget as a problem of allocation, and its solution as a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from pytorch_quant.analysis.allocation import allocate, front, total
from pytorch_quant.analysis.bit_search import BitPoint, BitSearch, LayerBits, choice_names
from pytorch_quant.analysis.costs import bit_operations, model_bits, weight_bits
from pytorch_quant.placement.layers import Layer
from pytorch_quant.scheme import Scheme


@dataclass(frozen=True)
class BitProblem:
    """What was measured.

    Attributes:
        model: The float model.
        layers: Those to assign, by name.
        macs: Multiply-accumulates of each.
        errors: The error of each layer by the number of the scheme; only finite ones.
        schemes: The choices.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    macs: Mapping[str, int]
    errors: Mapping[str, Mapping[int, float]]
    schemes: Sequence[Scheme | None]

    def solve(
        self,
        limits: Mapping[str, float],
        method: str,
        minimize: str,
        points: int,
        rules: Mapping[Any, Any],
    ) -> BitSearch:
        """The best assignment within the limits, and the front; arguments as in `search_bits`.

        Raises:
            ValueError: the limits cannot be met, every choice of a layer has an infinite error, or
                layers that share a weight have no choice in common.
        """
        broken = [name for name, found in self.errors.items() if not found]
        if broken:
            raise ValueError(
                f"search_bits: every choice makes the output of the model infinite or NaN in "
                f"{broken[0]}; add None to the choices"
            )
        for group, numbers in zip(self._groups, self._numbers, strict=True):
            if not numbers:
                raise ValueError(
                    f"search_bits: {', '.join(group)} share a weight, and no choice fits all of "
                    "them; add None to the choices"
                )
        room = {
            key: self._absolute(key, value) - (self._rest if key == "size" else 0.0)
            for key, value in limits.items()
        }
        objective = minimize if set(limits) == {"error"} else "error"
        options = self._options
        chosen = allocate(options, objective, room)
        if chosen is None:
            raise ValueError(self._impossible(limits))
        final = self._point(chosen)
        picked = self._picked(chosen)
        spent = next((key for key in limits if key != "error"), minimize)
        names = choice_names(self.schemes)
        rows = [
            LayerBits(
                name,
                layer.op,
                final.choices[name],
                self.errors[name][picked[name]],
                {names[number]: error for number, error in self.errors[name].items()},
                layer.module.weight.numel(),  # type: ignore[operator]
                self.macs[name],
            )
            for name, layer in self.layers.items()
        ]
        kept = {key: value for key, value in rules.items() if key not in picked}
        ours = {name: self.schemes[number] for name, number in picked.items()}
        curve = [self._point(one) for one in front(options, spent, "error", points)]
        return BitSearch(method, rows, final, curve, {**kept, **ours})

    @cached_property
    def _groups(self) -> list[list[str]]:
        """The names of layers that share a weight, which get one choice."""
        groups: dict[int, list[str]] = {}
        for name, layer in self.layers.items():
            # A weight that a parametrization computes is another tensor each time.
            weight = layer.module._parameters.get("weight")
            groups.setdefault(id(layer.module if weight is None else weight), []).append(name)
        return list(groups.values())

    @cached_property
    def _numbers(self) -> list[list[int]]:
        """The numbers of the schemes that each group can take."""
        return [
            sorted(set.intersection(*(set(self.errors[name]) for name in group)))
            for group in self._groups
        ]

    @cached_property
    def _options(self) -> list[list[dict[str, float]]]:
        return [
            [
                {
                    "error": sum(self.errors[name][number] for name in group),
                    "size": self._bytes(group, self.schemes[number]),
                    "bops": float(
                        sum(bit_operations(self.macs[n], self.schemes[number]) for n in group)
                    ),
                }
                for number in numbers
            ]
            for group, numbers in zip(self._groups, self._numbers, strict=True)
        ]

    @cached_property
    def _read_elsewhere(self) -> set[int]:
        """The ids of parameters that other modules hold, such as a tied embedding."""
        assigned = {id(layer.module) for layer in self.layers.values()}
        others = (module for module in self.model.modules() if id(module) not in assigned)
        return {id(held) for module in others for held in module._parameters.values()}

    def _bytes(self, group: list[str], scheme: Scheme | None) -> float:
        """What the weight of a group takes, beyond what stays in any case."""
        layer = self.layers[group[0]]
        stays = id(layer.module._parameters.get("weight", layer)) in self._read_elsewhere
        if stays and (scheme is None or scheme.weight is None):
            return 0.0
        return weight_bits(layer, scheme) / 8

    def _picked(self, chosen: list[int]) -> dict[str, int]:
        """The number of the scheme of each layer, in the order of the model."""
        picked = {
            name: numbers[i]
            for group, numbers, i in zip(self._groups, self._numbers, chosen, strict=True)
            for name in group
        }
        return {name: picked[name] for name in self.layers}

    @property
    def _whole(self) -> float:
        return model_bits(self.model) / 8

    @property
    def _rest(self) -> float:
        """Bytes that no choice touches."""
        floats = sum(self._bytes(group, None) for group in self._groups)
        return max(self._whole - floats, 0.0)

    @property
    def _float_bops(self) -> float:
        return float(sum(bit_operations(self.macs[name], None) for name in self.layers))

    def _absolute(self, key: str, value: float) -> float:
        """A limit in bytes or operations; up to 1 it is a share of the float model."""
        if key == "error" or value > 1:
            return float(value)
        return value * (self._whole if key == "size" else self._float_bops)

    def _point(self, chosen: list[int]) -> BitPoint:
        names, options = choice_names(self.schemes), self._options
        size = self._rest + total(options, chosen, "size")
        bops = total(options, chosen, "bops")
        return BitPoint(
            size,
            size / self._whole,
            bops,
            bops / max(self._float_bops, 1.0),
            total(options, chosen, "error"),
            {name: names[number] for name, number in self._picked(chosen).items()},
        )

    def _impossible(self, limits: Mapping[str, float]) -> str:
        parts = []
        for key, value in limits.items():
            least = sum(min(option[key] for option in layer) for layer in self._options)
            if key == "size":
                least += self._rest
                shown = f"{least:,.0f} bytes, {least / self._whole:.4f} of the float model"
            elif key == "bops":
                ratio = least / max(self._float_bops, 1.0)
                shown = f"{least:,.0f}, {ratio:.4f} of the float model"
            else:
                shown = f"{least:.4g}"
            parts.append(f"{key}={value:g} (the least possible is {shown})")
        together = " together" if len(parts) > 1 else ""
        return f"search_bits: the choices cannot meet the budget {', '.join(parts)}{together}"
