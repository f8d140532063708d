"""Running batches where each forward pass is collective, as with FSDP2: all processes in step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytorch_quant import distributed
from pytorch_quant.nn.quantizer.interception import Proceed
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

_ENDED, _READY, _FAILED = range(3)


@dataclass
class Faults:
    """The first error of a quantizer, kept until the forward pass is over."""

    first: Exception | None = None


@contextmanager
def faults_wait(quantizers: Iterable[TensorQuantizer]) -> Iterator[Faults]:
    """Keep what quantizers raise while they collect, in the block, and collect no more after it.

    A process that leaves in the middle of a forward pass would leave the others waiting.
    """
    faults, held = Faults(), list(quantizers)

    def guarded(x: Tensor, proceed: Proceed) -> Tensor:
        try:
            return proceed(x)
        except Exception as error:
            if faults.first is not None:
                # Nobody collects any more, so that it comes from elsewhere.
                raise
            faults.first = error
            for each in held:
                each.disable_calib()
            return proceed(x)

    with ExitStack() as stack:
        for quantizer in held:
            stack.enter_context(quantizer.intercepted(guarded))
        yield faults


def in_step(batches: Iterable[Any], faults: Faults) -> Iterator[tuple[Any, bool]]:
    """Batches to run, and whether each is one of this process's own; as many in all processes.

    A process that has run out gets its last batch again, or that of another process.

    Args:
        batches: Of this process.
        faults: Errors of its quantizers, which end the batches of all processes.

    Raises:
        Exception: what `batches` or a quantizer raised, here. The other processes see an end.
    """
    own, stand_in, started = iter(batches), None, False
    while True:
        batch, state, failure = None, _ENDED, faults.first
        if failure is None:
            try:
                batch = next(own)
                state = _READY
            except StopIteration:
                pass
            except Exception as error:
                failure = error
        states = distributed.gather_numbers(state if failure is None else _FAILED)
        if failure is not None:
            raise failure
        if _FAILED in states or _READY not in states:
            return
        if not started and _ENDED in states:
            # Who has no batch now never had one.
            source = states.index(_READY)
            sent = _sent(batch) if distributed.rank() == source else None
            stand_in = _received(distributed.broadcast_object(sent, source))
        started = True
        if state == _READY:
            stand_in = batch
        yield stand_in, state == _READY


@dataclass
class _Sent:
    """A tensor on its way to another process, and the kind of device it belongs to."""

    values: Tensor
    device: str


def _sent(batch: Any) -> Any:
    return _mapped(batch, Tensor, lambda t: _Sent(t.detach().cpu(), t.device.type))


def _received(batch: Any) -> Any:
    def placed(sent: _Sent) -> Tensor:
        # A device type without a number is the current device of this process.
        return sent.values.to(torch.device(sent.device))

    return _mapped(batch, _Sent, placed)


def _mapped(value: Any, kind: type, function: Any) -> Any:
    if isinstance(value, kind):
        return function(value)
    if type(value) is dict:
        return {key: _mapped(item, kind, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, kind, function) for item in value)
    return value
