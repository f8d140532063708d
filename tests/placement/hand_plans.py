"""Plans written by hand, for tests of what carries them out."""

from __future__ import annotations

import numpy as np
import torch
from reference import fake_quant
from torch import nn

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.apply import apply_plan
from pytorch_quant.placement.plan import Place, Plan, PlannedQuantizer

AMAX = 1.5


def planned(*places: Place, amax: float | None = AMAX, axis: int | None = None) -> PlannedQuantizer:
    desc = QuantDescriptor(8, amax=amax, axis=axis)
    return PlannedQuantizer(desc, places, places[0].call or "layer", "a test")


def place(call: str | None, *operand: int | str, module: str = "") -> Place:
    return Place(module, call, operand)


def plan(*quantizers: PlannedQuantizer, counts=None, framed=()) -> Plan:
    return Plan("tensorrt", list(quantizers), [], counts or {}, list(framed))


def quantized(model: nn.Module, *quantizers: PlannedQuantizer, framed=(), **counts) -> nn.Module:
    """`model` with quantizers for calls of its own forward; `counts` by kind."""
    return apply_plan(model, plan(*quantizers, counts={"": counts}, framed=framed))


class Function(nn.Module):
    """A function of its inputs, as a forward."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def fq(x: torch.Tensor, amax=AMAX) -> torch.Tensor:
    """The independent reference."""
    y = fake_quant(x.detach().numpy(), np.asarray(amax, np.float32))
    return torch.from_numpy(np.asarray(y, np.float32))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
