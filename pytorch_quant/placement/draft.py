"""A plan in the making: what each call of a recorded pass gets, one kind of call after another."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pytorch_quant.dataflow import Call, Dataflow
from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.nn.mixins import QuantInputMixin
from pytorch_quant.op_kinds import own_name
from pytorch_quant.placement.float_layers import reason_to_leave
from pytorch_quant.placement.frame_counts import calls_by_run, uneven
from pytorch_quant.placement.layers import Layer, check_scheme, find_layers, weight_descriptor
from pytorch_quant.placement.plan import LeftFloat, Operand, Place
from pytorch_quant.placement.products import PROBABILITIES, PRODUCTS, Product, find_product
from pytorch_quant.placement.requantized import AVERAGES, CONCATENATIONS, PAIRED, Taken, averaged
from pytorch_quant.placement.residuals import ResidualAdd, find_add
from pytorch_quant.placement.rules import BoundRules, Choice, Rules
from pytorch_quant.placement.sharing import Key, Use
from pytorch_quant.placement.tracing import Tracing, operand, operands

_WORDS = {
    "conv": "convolution",
    "conv_transpose": "transposed convolution",
    "linear": "linear layer",
    "matmul": "matrix product",
    "einsum": "matrix product",
    "scaled_dot_product_attention": "attention",
}


class Draft:
    """What is known of one model, and what is decided so far.

    Args:
        model: The model.
        flow: One pass of it.
        rules: The user's rules.
        placement: The runtime.

    Attributes:
        products: For each product, by the index of its call, whether it is quantized.
        taken: The operands that get a quantizer, or have one.
        uses: The same in order, with places.
        joined: Pairs of tensors that need one scale.
        left: What stays float, by site.
    """

    def __init__(self, model: nn.Module, flow: Dataflow, rules: Rules, placement: str) -> None:
        self.flow = flow
        self.placement = placement
        self.tracing = Tracing(flow)
        self.layers = find_layers(flow.modules)
        self.counts = calls_by_run(flow)
        self.products: dict[int, bool] = {}
        self.taken: Taken = {}
        self.uses: list[Use] = []
        self.joined: list[tuple[Key, Key]] = []
        self.left: dict[str, LeftFloat] = {}
        self._uneven = uneven(self.counts)
        # The first call in a run of a layer takes what enters the layer: padding comes before.
        self._entries: dict[tuple[str, int], Call] = {}
        for call in flow.calls:
            if call.module in self.layers:
                self._entries.setdefault((call.module, call.run), call)
        self._layer_quantizers, self._others = self._quantized_before()
        self.rules = self._bind(rules)

    def _quantized_before(self) -> tuple[set[str], set[int]]:
        """The layers with quantizers of their own, and the values that other quantizers took."""
        layers = {n for n, m in self.flow.modules.items() if isinstance(m, QuantInputMixin)}
        values: set[int] = set()
        for name, entered in self.flow.quantizers.items():
            owner = name.rpartition(".")[0]
            if owner not in layers and owner.rpartition(".")[0] not in layers:
                values.update(entered)
        return layers, values

    def _bind(self, rules: Rules) -> BoundRules:
        kinds = PRODUCTS | CONCATENATIONS | AVERAGES | PAIRED
        sites = {name: layer.op for name, layer in self.layers.items()}
        for call in self.flow.calls:
            if call.op in kinds and "#" in call.site and call.module not in self.layers:
                sites[call.site] = call.op
        functions = {call.site: own_name(call.function) for call in self.flow.calls}
        return rules.bind(
            self.flow.modules, sites, {site: functions[site] for site in sites if site in functions}
        )

    def calls(self, *kinds: str) -> Iterator[tuple[Call, Layer | None]]:
        """The calls of some kinds that can be planned, with the layer that they are, if any."""
        for call in self.flow.calls:
            layer = self.layers.get(call.module)
            if call.module in self._layer_quantizers or (layer is not None and layer.op != call.op):
                continue
            if call.op in kinds:
                yield call, layer

    def site(self, call: Call) -> str:
        """The name that rules match."""
        return call.module if call.module in self.layers else call.site

    def choice(self, call: Call) -> Choice:
        """What the rules say of a call."""
        return self.rules.choice(self.site(call), call.op)

    def leave(self, call: Call, reason: str) -> None:
        """Note that a call stays float."""
        self.left.setdefault(self.site(call), LeftFloat(self.site(call), call.op, reason))

    def take(
        self,
        call: Call,
        path: Operand,
        key: Key,
        descriptor: QuantDescriptor,
        reason: str,
        layer_operand: str = "",
    ) -> None:
        """Quantize an operand of a call, or of the layer that it is."""
        if layer_operand:
            place = Place(call.module, None, (layer_operand,))
        else:
            place = Place(call.module, call.site.rpartition("/")[2], path)
        order = call.index, len(self.uses)
        self.uses.append(Use(place, key, descriptor, call.op, reason, call.run, order))
        self.taken.setdefault(call.index, {})[path] = descriptor

    def is_uneven(self, call: Call) -> bool:
        """Whether runs of the module differ in how often they make calls of this kind."""
        if call.module in self.layers or (call.module, call.op) not in self._uneven:
            return False
        self.leave(call, "its module makes another number of these calls in each of its runs")
        return True

    def had_quantizer(self, call: Call, values: list[int]) -> bool:
        """Whether quantizers of before take one of these; the call is then done."""
        if not any(value in self._others for value in values):
            return False
        self.taken[call.index] = dict.fromkeys(operands(call))
        return True

    # Products

    def add_products(self) -> None:
        """Everything that multiplies by a weight, and products of two activations."""
        for call in self.flow.calls:
            if call.module in self._layer_quantizers:
                self.taken[call.index] = dict.fromkeys(operands(call))
                if call.op in PRODUCTS:
                    self.products[call.index] = True
            elif call.op == "script":
                self.leave(call, "a scripted module is compiled; nothing can be placed in it")
        first = next((c.index for c in self.flow.calls if c.op == "conv"), None)
        for call, layer in self.calls(*PRODUCTS):
            product = find_product(call, self.tracing, first)
            if product is not None:
                self.products[call.index] = self._add_product(product, layer)
            elif layer is not None:
                self.leave(call, "its input does not depend on the model's")
            elif call.op == "einsum" and any(self.tracing.active(v) for v in call.inputs):
                self.leave(call, "no plain product of two matrices")

    def _add_product(self, product: Product, layer: Layer | None) -> bool:
        call = product.call
        values = [value for _, value in product.activations]
        if layer is None and self.had_quantizer(call, values):
            return True
        choice = self.choice(call)
        if choice.scheme is None:
            self.leave(call, "a rule")
            return False
        reason = reason_to_leave(product.shape, choice) if self.placement == "tensorrt" else None
        if reason is not None:
            self.leave(call, reason)
            return False
        if self.is_uneven(call):
            return False
        return self._quantize_product(product, layer, choice)

    def _quantize_product(self, product: Product, layer: Layer | None, choice: Choice) -> bool:
        call, scheme = product.call, choice.scheme
        assert scheme is not None
        summed = None
        if product.weight is not None and product.summed_axis is not None:
            summed = self.tracing.shape(product.weight[1])[product.summed_axis]
        check_scheme(self.site(call), call.op, choice, self.placement, summed)
        word = _WORDS[call.op]
        if scheme.input is None and product.weight is None:
            self.leave(call, f"{scheme.name} quantizes weights only, and it has none")
            return False
        if scheme.input is not None:
            entry = self._entries.get((call.module, call.run), call)
            for path, value in product.activations:
                if layer is not None:
                    value = entry.inputs[0]
                    self.taken.setdefault(entry.index, {})[next(iter(operands(entry)))] = (
                        scheme.input
                    )
                key = self.tracing.root(value)
                named = "input" if layer is not None else ""
                self.take(call, path, key, scheme.input, f"input of a {word}", named)
            if product.is_attention:
                inner = ("probabilities", call.index)
                reason = "softmax inside of an attention (L12)"
                self.take(call, PROBABILITIES, inner, scheme.input, reason)
        if product.weight is not None:
            path, value = product.weight
            weight = weight_descriptor(scheme, product.weight_axis, product.summed_axis)
            if weight is not None:
                named = "weight" if layer is not None else ""
                self.take(call, path, ("weight", value), weight, f"weight of a {word}", named)
        return True

    # Layers and calls without weights

    def partner_descriptor(
        self, choice: Choice, partner: QuantDescriptor | None
    ) -> QuantDescriptor | None:
        """The descriptor of a call without a weight: without a rule, that of its neighbour."""
        if choice.scheme is None:
            return None
        chosen = choice.scheme.input
        if not choice.explicit and partner is not None:
            chosen = partner
        return None if chosen is None or chosen.dynamic else chosen

    def input_descriptor(self, call: Call) -> QuantDescriptor | None:
        """How the activation of a product is quantized."""
        tensor = operand(call, 0, "input")
        return None if tensor is None else self.taken.get(call.index, {}).get(tensor[0])

    def residual_adds(self) -> Iterator[tuple[ResidualAdd, Choice]]:
        """The additions of two activations that may get quantizers, with what the rules say."""
        for call, _ in self.calls("add"):
            add = find_add(call, self.tracing, self.products)
            if add is None or self.had_quantizer(call, [value for _, value in add.sides]):
                continue
            choice = self.choice(call)
            if choice.scheme is None:
                self.leave(call, "a rule")
            elif not self.is_uneven(call):
                check_scheme(call.site, call.op, choice, self.placement)
                yield add, choice

    def average(self, call: Call, layer: Layer | None) -> tuple[Operand, int] | None:
        """What a call averages, if it may get a quantizer."""
        tensor = averaged(call, self.tracing)
        if tensor is None or (layer is None and self.had_quantizer(call, [tensor[1]])):
            return None
        return tensor
