"""The loss that quantization costs, by layer, from one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.analysis.losses import (
    Loss,
    check_loss,
    check_samples,
    loss_of,
    samples_in,
    target_of,
)
from pytorch_quant.analysis.sites import Site
from pytorch_quant.analysis.switches import Switch, Switches
from pytorch_quant.batches import copied, tensors_in


class FisherSums:
    """Adds up `1/2 sum((g * e)**2)` for each site.

    The loss of a sample grows by `1/2 e^T H e` where the error `e` meets the Hessian `H` at a
    minimum; the diagonal of the empirical Fisher matrix `g g^T` stands for `H`, as in Li et al.,
    "BRECQ", ICLR 2021, equation 10. `g` is the gradient of the loss of one sample, `e` the error of
    the output of a layer that is quantized alone, input and weight; of a call, the errors of the
    operands. The loss of a batch is taken as the mean over its samples.

    Args:
        switches: The model, all sites off.
        names: The sites to measure.
        loss: See `pytorch_quant.analysis.losses`.
        who: The function for messages.

    Attributes:
        total: The sum over samples, by site.
        samples: How many there were.
    """

    def __init__(self, switches: Switches, names: list[str], loss: Loss | None, who: str) -> None:
        self.switches = switches
        self.names = names
        self.loss = loss
        self.who = who
        self.total = dict.fromkeys(names, 0.0)
        self.samples = 0
        self._errors: list[tuple[str, Tensor, Tensor]] = []

    def add(self, batch: Any, number: int) -> None:
        """Run one batch forward and backward; no gradient is stored in a parameter.

        Args:
            batch: The batch.
            number: Which one it is, from 0, for messages.

        Raises:
            ValueError: labels or a loss are missing, or the loss does not depend on the model, or
                it is NaN or infinite.
        """
        target = copied(target_of(batch, self.loss, self.who))
        self._errors = []
        # cuDNN has no backward pass of recurrent layers in eval mode.
        with self._tapped(), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            # A clone made here takes part in autograd, also of an inference tensor.
            output = self.switches.run(batch)
            count = samples_in(target, output)
            if not count:
                self._errors = []
                return
            loss = loss_of(output, target, self.loss, self.who)
            check_loss(loss, number, self.who)
            points = [point for _, point, _ in self._errors]
            if not points:
                grads: tuple[Tensor | None, ...] = ()
            elif not loss.requires_grad:
                raise ValueError(
                    f"{self.who}: the loss has no gradient; the model or the loss detaches it, or "
                    "runs without gradients"
                )
            else:
                grads = torch.autograd.grad(loss, points, allow_unused=True)
        self.samples += count
        for (name, _, error), grad in zip(self._errors, grads, strict=True):
            if grad is not None:
                # The gradient of the mean is 1/count of that of a sample.
                power = torch.linalg.vector_norm((grad.double() * count * error).reshape(-1)) ** 2
                self.total[name] += 0.5 * float(power)
        self._errors = []

    def means(self) -> dict[str, float]:
        """The predicted increase of the mean loss, by site.

        Raises:
            ValueError: there were no samples.
        """
        check_samples(self.samples, self.who)
        return {name: total / self.samples for name, total in self.total.items()}

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        handles: list[Any] = []
        running: list[Site] = []
        self.switches.use([])

        def after(site: Site) -> Callable[..., Any]:
            def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                if running:
                    return None
                running.append(site)
                try:
                    with torch.no_grad():
                        self.switches.use([site.name])
                        found = list(tensors_in(layer(*copied(args), **copied(kwargs))))
                finally:
                    self.switches.use([])
                    running.pop()
                pairs = iter(found)
                return _replaced(output, lambda z: self._point(site.name, z, next(pairs)))

            return hook

        def tap(switch: Switch, x: Tensor) -> Tensor:
            if running:
                return x
            with torch.no_grad():
                quantized = switch.quantized(x)
            # A node of its own: other readers of the tensor do not count.
            with torch.enable_grad():
                return self._point(switch.site, x.clone(), quantized)

        try:
            for name in self.names:
                site = self.switches.sites[name]
                if site.layer is not None:
                    handles.append(site.layer.register_forward_hook(after(site), with_kwargs=True))
                else:
                    for switch in self.switches.all[name]:
                        switch.set(on=False, tap=tap)
            yield
        finally:
            self.switches.tap(None)
            for handle in handles:
                handle.remove()

    def _point(self, name: str, z: Tensor, quantized: Tensor) -> Tensor:
        """A tensor to go on with, whose gradient is taken."""
        if not z.is_floating_point():
            return z
        with torch.enable_grad():
            point = z if z.requires_grad else z.detach().requires_grad_()
            error = quantized.detach().double() - z.detach().double()
            self._errors.append((name, point, error))
            # What follows may write to it in place.
            return point.clone()


def _replaced(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor replaced, in the order of `tensors_in`."""
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, dict):
        return type(value)((key, _replaced(item, replace)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(item, replace) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(item, replace) for item in value)
    return value
