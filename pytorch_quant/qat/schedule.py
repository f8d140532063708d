"""The usual recipe of quantization-aware training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from pytorch_quant.batches import Forward
from pytorch_quant.fold import freeze_batchnorm
from pytorch_quant.ptq import calibrate
from pytorch_quant.qat.freezing import freeze_ranges, unfreeze_batchnorm
from pytorch_quant.qat.learning import learn_ranges, range_parameters
from pytorch_quant.qat.moving import update_ranges
from pytorch_quant.qat.selection import chosen
from pytorch_quant.qat.undoing import Undo

Ranges = Literal["moving", "lsq", "pact", "fixed"]


class QATSchedule:
    """Calibrate, train with moving or learned ranges, freeze batch norm, freeze ranges; cosine.

    Constructing it calibrates `model` and switches its ranges, in place. Make the optimizer
    afterwards, and call `step(optimizer)` after each of its steps. That sets the learning rate of
    each group to `min_factor + (1 - min_factor) * (1 + cos(pi * done / steps)) / 2` times what it
    was at first (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5 without restarts), and
    freezes when it is time. Learned ranges freeze by a learning rate of 0, which suits models in
    DistributedDataParallel: they need a group of their own, see `parameter_groups`.

    Statistics of batch norm that are still moving shift what ranges see, so that they freeze
    first.

    Args:
        model: Quantized. Calibrated, or `batches` are given.
        steps: How many steps of the optimizer the training has.
        batches: Batches to calibrate on, see `calibrate`.
        method: How they range activations.
        weight_method: How weights are ranged.
        forward: `forward(model, batch)` runs one batch of the calibration.
        ranges: `moving` (`update_ranges`), `lsq` or `pact` (`learn_ranges`), or `fixed`.
        momentum: Of moving ranges.
        freeze_batchnorm_at: After which share of the steps, 0 to 1; None for never.
        freeze_ranges_at: The same for ranges.
        min_factor: The learning rate at the end, as a share of that at first.
        progress: Show a progress bar in calibration.

    Raises:
        RuntimeError: quantizers without a range and no batches to calibrate on, naming them.
        TypeError: `steps` is no int.
        ValueError: an argument out of range, or a model without quantizers.
        Exception: what `calibrate` and `learn_ranges` raise.

    Attributes:
        done: How many steps were made.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        batches: Iterable[Any] | None = None,
        method: str = "max",
        weight_method: str = "max",
        forward: Forward | None = None,
        ranges: Ranges = "moving",
        momentum: float = 0.99,
        freeze_batchnorm_at: float | None = 0.5,
        freeze_ranges_at: float | None = 0.75,
        min_factor: float = 0.0,
        progress: bool = True,
    ) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"steps must be an int, got {steps!r}; round it")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if ranges not in ("moving", "lsq", "pact", "fixed"):
            raise ValueError(f"ranges must be moving, lsq, pact or fixed, got {ranges!r}")
        shares = {"freeze_batchnorm_at": freeze_batchnorm_at, "freeze_ranges_at": freeze_ranges_at}
        for name, share in {**shares, "min_factor": min_factor}.items():
            if share is None and name != "min_factor":
                continue
            if share is None or not 0 <= share <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {share!r}")
        self.done = 0
        self._model, self._steps, self._ranges = model, steps, ranges
        self._momentum, self._min_factor = momentum, min_factor
        self._batchnorm_at = _step_of(freeze_batchnorm_at, steps)
        self._ranges_at = _step_of(freeze_ranges_at, steps)
        if batches is not None:
            calibrate(
                model,
                batches,
                method,
                weight_method=weight_method,
                forward=forward,
                progress=progress,
            )
        _check_calibrated(model)
        if ranges in ("lsq", "pact"):
            learn_ranges(model, "lsq" if ranges == "lsq" else "pact")
        self._froze_batchnorm = False
        self._stop_moving: Undo | None = None
        self._switch()

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count a step of the optimizer, freeze what is due, and set the learning rates.

        Args:
            optimizer: None leaves learning rates alone; learned ranges are frozen by
                `freeze_ranges` then.

        Raises:
            ValueError: a learned range is not in the optimizer, or shares its group with other
                parameters and is to be frozen; nothing is counted then.
        """
        learned = {} if optimizer is None else range_parameters(self._model)
        if optimizer is not None:
            self._check_groups(optimizer, learned)
        self.done += 1
        if self.done in (self._batchnorm_at, self._ranges_at):
            self._switch()
        if optimizer is not None:
            self._set_rates(optimizer, learned)
        elif self._ranges in ("lsq", "pact") and self.done == self._ranges_at:
            freeze_ranges(self._model)

    def state_dict(self) -> dict[str, Any]:
        """How far the schedule is; learning rates are in the state of the optimizer."""
        return {"done": self.done, "steps": self._steps, "ranges": self._ranges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken; freezes in the model what was frozen.

        Raises:
            ValueError: the state is that of another recipe.
        """
        mine = {"steps": self._steps, "ranges": self._ranges}
        differing = [key for key, value in mine.items() if state.get(key) != value]
        if differing:
            key = differing[0]
            raise ValueError(
                f"the state is of a schedule with {key}={state.get(key)!r}, this one has "
                f"{key}={mine[key]!r}; construct it with the same arguments"
            )
        self.done = int(state["done"])
        self._switch()

    @property
    def ranges_frozen(self) -> bool:
        """Whether ranges are frozen by now."""
        return self._ranges_at is not None and self.done >= self._ranges_at

    def _switch(self) -> None:
        """Bring the model to the state that belongs to the number of steps."""
        frozen = self._batchnorm_at is not None and self.done >= self._batchnorm_at
        if frozen:
            freeze_batchnorm(self._model)
        elif self._froze_batchnorm:
            unfreeze_batchnorm(self._model)
        self._froze_batchnorm = frozen
        if self._stop_moving is not None:
            self._stop_moving()
            self._stop_moving = None
        if self._ranges == "moving" and not self.ranges_frozen:
            self._stop_moving = update_ranges(self._model, self._momentum)

    def _set_rates(
        self, optimizer: torch.optim.Optimizer, learned: dict[str, nn.Parameter]
    ) -> None:
        share = min(self.done / self._steps, 1.0)
        factor = (1 + math.cos(math.pi * share)) / 2
        factor = self._min_factor + (1 - self._min_factor) * factor
        ranges = {id(p) for p in learned.values()}
        for group in optimizer.param_groups:
            first = group.setdefault("initial_lr", group["lr"])
            own = group["params"] and all(id(p) in ranges for p in group["params"])
            new = 0.0 if own and self.ranges_frozen else first * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(new)
            else:
                group["lr"] = new

    def _check_groups(
        self, optimizer: torch.optim.Optimizer, learned: dict[str, nn.Parameter]
    ) -> None:
        if self._ranges in ("lsq", "pact"):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            missing = [n for n, p in learned.items() if p.requires_grad and id(p) not in held]
            if missing:
                raise ValueError(
                    f"{len(missing)} learned range(s) are not in the optimizer, such as "
                    f"{missing[0]}; make it after the QATSchedule, of qat.parameter_groups"
                    "(model, lr=...)"
                )
        if self._ranges_at is None:
            return
        names = {id(p): name for name, p in learned.items()}
        for group in optimizer.param_groups:
            inside = [names[id(p)] for p in group["params"] if id(p) in names]
            if inside and len(inside) < len(group["params"]):
                raise ValueError(
                    f"the range {inside[0]} is in one group with other parameters, whose learning "
                    "rate cannot become 0 to freeze it; make the optimizer of "
                    "qat.parameter_groups(model, lr=...), or pass freeze_ranges_at=None"
                )


def _step_of(share: float | None, steps: int) -> int | None:
    return None if share is None else math.ceil(share * steps)


def _check_calibrated(model: nn.Module) -> None:
    found, _ = chosen(model, True, True, "QATSchedule")
    missing = [name for name, q in found.items() if q.needs_amax]
    if missing:
        raise RuntimeError(
            f"QATSchedule needs ranges to start from, and {len(missing)} quantizer(s) have none: "
            f"{', '.join(missing)}. Pass batches=[...] to calibrate on, call calibrate(model, "
            "batches) before, or disable() those that no batch reaches"
        )
