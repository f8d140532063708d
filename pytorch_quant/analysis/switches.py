"""Each quantized place of a model on a switch of its own; afterwards all is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.analysis.sites import Holder, Site, find_sites, is_active, lacks_range, unwrapped
from pytorch_quant.batches import Forward, call_model, copied, tensors_in
from pytorch_quant.nn.modes import weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.plain_pass import plain_forward

Tap = Callable[["Switch", Tensor], Tensor]


class Switch:
    """A quantizer at one of its places, which it does not share.

    Args:
        holder: The place.
        site: The name of its layer or call.
        is_weight: It is the weight quantizer of a layer.

    Attributes:
        quantizer: Quantizes as the modes of the quantizer say, in eval mode and without collecting.
        on: Quantize; otherwise pass tensors through.
        tap: Is shown each tensor that comes, and gives what goes on instead of it.
    """

    def __init__(self, holder: Holder, site: str, is_weight: bool = False) -> None:
        self.holder = holder
        self.site = site
        self.is_weight = is_weight
        self.on = False
        self.tap: Tap | None = None
        # Shallow: buffers and hooks are those of the quantizer, modes and interceptions their own.
        self.quantizer = copy.copy(holder.quantizer)
        self.quantizer.training = False
        self.quantizer.disable_calib()
        self._stand_in = copy.copy(self.quantizer)
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    def set(self, *, on: bool, tap: Tap | None) -> None:
        """Change the attributes."""
        self.on, self.tap = on, tap
        # A recurrent layer whose quantizers are all disabled does not call them.
        if on or tap is not None:
            self._stand_in.enable()
        else:
            self._stand_in.disable()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let it decide what the quantizer does at its place."""
        modules = self.holder.module._modules
        self.set(on=False, tap=None)
        with self._stand_in.intercepted(self._passed):
            modules[self.holder.key] = self._stand_in
            try:
                yield
            finally:
                modules[self.holder.key] = self.holder.quantizer

    def quantized(self, x: Tensor) -> Tensor:
        """What the quantizer makes of `x` when it is on."""
        if not isinstance(x, nn.Parameter) or torch.is_grad_enabled():
            return self.quantizer.forward(x)
        # The parameter is kept, so that its id stays its own.
        if id(x) not in self._weights:
            self._weights[id(x)] = x, self.quantizer.forward(x)
        return self._weights[id(x)][1]

    def _passed(self, x: Tensor, proceed: Any) -> Tensor:
        if self.tap is not None:
            x = self.tap(self, x)
        return self.quantized(x) if self.on else self.quantizer.prescaled(x)


class Switches:
    """The quantized places of one model, all off at first; made by `switched`.

    Attributes:
        model: The model, without wrappers.
        sites: By name.
        all: The switches of each site.
    """

    def __init__(self, model: nn.Module, sites: list[Site], forward: Forward | None) -> None:
        self.model = model
        self.sites = {site.name: site for site in sites}
        weights = weight_quantizers(model)
        self.all = {
            site.name: [
                Switch(holder, site.name, holder.quantizer in weights)
                for holder in site.holders
                if is_active(holder.quantizer)
            ]
            for site in sites
        }
        self._forward = forward or call_model
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        self._devices = sorted(index for index in devices if index is not None)

    def __iter__(self) -> Iterator[Switch]:
        for switches in self.all.values():
            yield from switches

    def use(self, names: Iterable[str]) -> None:
        """Let the sites of these names quantize, and no others."""
        chosen = set(names)
        for switch in self:
            switch.set(on=switch.site in chosen, tap=switch.tap)

    def tap(self, tap: Tap | None) -> None:
        """Show every tensor that comes to a quantizer to `tap`."""
        for switch in self:
            switch.set(on=switch.on, tap=tap)

    def run(self, batch: Any) -> Any:
        """What the model returns for a batch, which is left as it is.

        Every run of a batch draws the same random numbers, so that only quantization differs.
        """
        with torch.random.fork_rng(self._devices):
            return self._forward(self.model, copied(batch))

    def reference(self, batch: Any, number: int) -> list[Tensor]:
        """The floating-point tensors of the float model, as copies.

        Args:
            batch: The batch.
            number: Which one it is, from 0, for messages.

        Raises:
            ValueError: there are none, or they hold NaN.
        """
        expected = [tensor.clone() for tensor in self.outputs(batch, [])]
        for tensor in expected:
            if count := int(tensor.isnan().sum()):
                raise ValueError(
                    f"batch {number}: in float the model returns NaN in {count} of "
                    f"{tensor.numel()} values; look for bad data in the batch, or pass "
                    "forward=lambda model, batch: ... that returns the part that is real"
                )
        return expected

    def outputs(self, batch: Any, names: Iterable[str]) -> list[Tensor]:
        """The floating-point tensors that the model returns, with these sites quantizing.

        Raises:
            ValueError: there are none.
        """
        self.use(names)
        return float_tensors(self.run(batch))


def float_tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned.

    Raises:
        ValueError: there are none.
    """
    found = [t.detach() for t in tensors_in(outputs) if t.is_floating_point()]
    if not found:
        raise ValueError(
            f"the model returned no floating-point tensor (a {type(outputs).__name__}), so that no "
            "error can be measured; pass forward=lambda model, batch: ... that returns one"
        )
    return found


@contextmanager
def switched(model: nn.Module, forward: Forward | None, who: str) -> Iterator[Switches]:
    """Let each quantized place of `model` be switched alone, in eval mode without gradients.

    Quantizers are replaced by stand-ins meanwhile. Those that are disabled stay so and are in no
    site. Modes, buffers, the random state and the quantizers come back.

    Args:
        model: Quantized and calibrated.
        forward: `forward(model, batch)` runs one batch.
        who: The function for messages.

    Raises:
        RuntimeError: quantizers without a range, naming them.
        TypeError: `model` is no module.
        ValueError: no quantizers, or none that is enabled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who} takes a module, got {type(model).__name__}")
    inner = unwrapped(model)
    found = find_sites(inner)
    if not found:
        raise ValueError(
            f"{who}: the model has no TensorQuantizer; call quantize(model, example_inputs=...) "
            "and calibrate(model, batches) first"
        )
    sites = [site for site in found if any(is_active(h.quantizer) for h in site.holders)]
    if not sites:
        raise ValueError(f"{who}: every quantizer of the model is disabled; enable() some")
    _check_ranges(sites, who)
    switches = Switches(inner, sites, forward)
    with plain_forward(inner), ExitStack() as places:
        for switch in switches:
            places.enter_context(switch.in_place())
        yield switches


def _check_ranges(sites: list[Site], who: str) -> None:
    missing: dict[TensorQuantizer, str] = {}
    for site in sites:
        for holder in site.holders:
            if lacks_range(holder.quantizer):
                missing.setdefault(holder.quantizer, holder.name)
    if missing:
        raise RuntimeError(
            f"{who} on {len(missing)} uncalibrated quantizer(s): {', '.join(missing.values())}. "
            "Run calibrate(model, batches) first, or disable() them"
        )
