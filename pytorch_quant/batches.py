"""How a batch becomes the arguments of a model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Forward = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run `model` on `batch`.

    A tensor is passed as it is, a mapping as keywords, a tuple or list as positional arguments.
    Where `forward` takes one required argument and the batch is a pair, the second item is a target
    and is dropped.

    Raises:
        TypeError: a batch of another type, or a model that fails on the NumPy arrays in it.
        RuntimeError: a tensor of the batch is on another device than the model.
    """
    args: list[Any]
    kwargs: dict[str, Any]
    if isinstance(batch, Tensor):
        args, kwargs = [batch], {}
    elif isinstance(batch, Mapping):
        args, kwargs = [], dict(batch)
    elif isinstance(batch, PackedSequence):
        # A named tuple, but one argument.
        args, kwargs = [batch], {}
    elif isinstance(batch, (tuple, list)):
        drops_target = len(batch) == 2 and _required_arguments(model) == 1
        args, kwargs = list(batch[:1] if drops_target else batch), {}
    else:
        advice = "pass forward=lambda model, batch: ... for anything else"
        if isinstance(batch, np.ndarray):
            advice = "convert it with torch.from_numpy"
        raise TypeError(
            f"a batch is a tensor, a mapping of keywords, or a tuple or list of arguments, got "
            f"{type(batch).__name__}; {advice}"
        )
    values = [*args, *kwargs.values()]
    _check_device(model, values)
    try:
        return model(*args, **kwargs)
    except (AttributeError, TypeError) as error:
        # Not before: a model may take arrays.
        arrays = sum(isinstance(value, np.ndarray) for value in values)
        if not arrays:
            raise
        raise TypeError(
            f"the model failed on a batch with {arrays} NumPy array(s) among its arguments "
            f"({error}); convert them with torch.from_numpy"
        ) from error


def _required_arguments(model: nn.Module) -> int | None:
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        # torch.compile shows a signature that accepts anything.
        return _required_arguments(compiled)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    inner = getattr(model, "module", None)
    if isinstance(inner, nn.Module) and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        # DataParallel and its like accept anything and pass it on to the module they wrap.
        return _required_arguments(inner)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _check_device(model: nn.Module, values: list[Any]) -> None:
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    # A model that is spread over devices moves its own tensors.
    if len(devices) != 1:
        return
    (device,) = devices
    for value in values:
        if isinstance(value, Tensor) and value.device != device:
            raise RuntimeError(
                f"the batch is on {value.device}, the model on {device}; move one of them "
                "(batch.to(device)): nothing is moved between devices unasked"
            )


def count(batches: Any) -> int | None:
    """The number of batches where it is known, for progress bars."""
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None


def each(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, without a length that a progress bar would ask for."""
    yield from batches


def copied(value: Any) -> Any:
    """A batch or arguments with tensors of their own, in containers of the same types.

    Containers that cannot be made again, and what is neither, stay the same objects.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, MutableMapping):
        try:
            made = copy.copy(value)
            for key, item in value.items():
                made[key] = copied(item)
        except Exception:
            # A mapping of the user's own may refuse either; the model may still read it.
            return value
        return made
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        if isinstance(value, PackedSequence):
            # Its constructor checks and sorts.
            return value._replace(data=value.data.clone())
        return value._make(copied(item) for item in value)  # type: ignore[attr-defined]
    return value


def tensors_in(item: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results, in order: in containers, slices and dataclasses."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for part in item.values():
            yield from tensors_in(part)
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from tensors_in(part)
    elif isinstance(item, slice):
        yield from tensors_in((item.start, item.stop, item.step))
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        yield from tensors_in([getattr(item, part.name) for part in dataclasses.fields(item)])
