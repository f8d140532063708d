"""One forward pass of a model, recorded as a graph of the functions that it called.

    flow = record(model, example_inputs)
    for call in flow.calls:
        print(call.site, [flow.values[i].shape for i in call.inputs])

The model runs as it is, so that control flow, `*args`, dictionaries and dataclasses need no tracer;
what is recorded is the path that these inputs take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pytorch_quant.batches import call_model, tensors_in
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.op_kinds import COMPOSITES, METADATA, note_spelling, op_kind, opened
from pytorch_quant.plain_pass import plain_forward

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


@dataclass(frozen=True)
class Value:
    """One version of a tensor; an in-place call makes a new one of the same tensor.

    Attributes:
        index: Its place in `Dataflow.values`.
        producer: The index of the call that made it; None for inputs, parameters, buffers,
            constants, and tensors that were made where no torch function is seen (NumPy).
        shape: Its shape in this pass.
        dtype: Its dtype.
        parameter: The qualified name, if it is a parameter or a buffer.
    """

    index: int
    producer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str | None = None


@dataclass(frozen=True)
class Ref:
    """Stands in the arguments of a call for the tensor of a value."""

    value: int


@dataclass(frozen=True)
class Call:
    """One call of a torch function or tensor method.

    Attributes:
        index: Its place in `Dataflow.calls`, which is in the order in which calls ended.
        op: Its kind, one for all spellings; see `pytorch_quant.op_kinds`.
        function: What was called. For a scripted module, the module.
        module: The qualified name of the innermost running module, `""` for the model.
        run: Which run of that module it belongs to, counted from 0.
        site: `module/op#k`, where k counts the calls of this kind that take a floating-point tensor
            within one run of the module; `module/op` for a call that takes none.
        args: The positional arguments, with a `Ref` for each tensor, also inside of lists, tuples,
            mappings and slices. Objects of other kinds are replaced by their type.
        kwargs: The keyword arguments in the same form.
        inputs: The values of the tensors among the arguments, in order.
        outputs: The values of the tensors returned, then of those written to.
    """

    index: int
    op: str
    function: Callable
    module: str
    run: int
    site: str
    args: tuple
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, whichever way it was passed."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


@dataclass
class Dataflow:
    """What one forward pass did. Holds no tensor of it.

    Attributes:
        calls: In the order in which they ended.
        values: All versions of all tensors.
        modules: The modules of the model by qualified name; a shared one once.
        runs: The name of a module for each time that it ran, in the order of their start.
        quantizers: The values that passed each `TensorQuantizer`, one for each time. A quantizer
            makes no call and no value: what leaves it is what entered.
        inputs: The tensors among the model's arguments.
        outputs: The tensors in what the model returned.
    """

    modules: dict[str, nn.Module]
    calls: list[Call] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    quantizers: dict[str, list[int]] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    _consumers: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def producer(self, value: int) -> Call | None:
        """The call that made a value, if one was seen."""
        index = self.values[value].producer
        return None if index is None else self.calls[index]

    def consumers(self, value: int) -> list[Call]:
        """The calls that take a value, each once, in order."""
        return [self.calls[index] for index in self._consumers.get(value, ())]


def record(model: nn.Module, example_inputs: Any) -> Dataflow:
    """Run `model` once and record every torch function that it calls.

    The model runs as in `plain_forward` and is left as it was. Scripted modules appear as one call
    of kind `script`. A write to a view of a tensor makes a value without producer of every other
    view of its memory.

    Args:
        model: Any model that runs eagerly.
        example_inputs: A tensor, a mapping of keywords, or a tuple or list of arguments; as
            `pytorch_quant.batches.call_model` takes them.

    Returns:
        The calls and values. Tensors are freed as in any forward pass.

    Raises:
        TypeError: `example_inputs` is of another type.
        RuntimeError: `example_inputs` is on another device than the model.
        Exception: whatever the model raises.
    """
    recorder = _Recorder(model)
    with plain_forward(model):
        try:
            recorder.attach()
            with recorder:
                result = call_model(model, example_inputs)
            recorder.flow.outputs = recorder.values_in(result)
        finally:
            recorder.detach()
    return recorder.flow


@dataclass
class _Frame:
    module: nn.Module
    name: str
    run: int
    counts: Counter = field(default_factory=Counter)


class _Recorder(TorchFunctionMode):
    """Sees every torch function while it is active, and every module that starts or ends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Dataflow(dict(model.named_modules()))
        self._names = {module: name for name, module in self.flow.modules.items()}
        self._owned = WeakTensorKeyDictionary()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._owned[tensor] = name
        # The value of each live tensor, with the tensor's version when it was noted.
        self._known = WeakTensorKeyDictionary()
        self._frames = [_Frame(model, "", 0)]
        self._hooks: list[Any] = []
        self._silent = 0

    # Modules

    def attach(self) -> None:
        for module in self.flow.modules.values():
            if not isinstance(module, torch.jit.ScriptModule):
                # First in and last out: the user's own hooks count as part of the module.
                enter = module.register_forward_pre_hook(
                    self._enter, prepend=True, with_kwargs=True
                )
                leave = module.register_forward_hook(
                    self._leave, with_kwargs=True, always_call=True
                )
                self._hooks += [enter, leave]
        if any(isinstance(m, torch.jit.ScriptModule) for m in self.flow.modules.values()):
            # Scripted modules take no hooks of their own. Without keywords: torch forgets to take
            # back its note that a hook for all modules wants them.
            self._hooks.append(register_module_forward_hook(self._leave_script))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(self._frames) == 1:
            self.flow.inputs = self.values_in((args, kwargs))
        self._frames.append(self._started(module))
        self._silent += isinstance(module, TensorQuantizer)

    def _started(self, module: nn.Module) -> _Frame:
        name = self._names[module]
        self.flow.runs.append(name)
        return _Frame(module, name, self.flow.runs.count(name) - 1)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not any(frame.module is module for frame in self._frames[1:]):
            return
        left = None
        # After an error that the model caught, frames above this one are still there.
        while left is not module:
            left = self._frames.pop().module
            self._silent -= isinstance(left, TensorQuantizer)
        entered = self.values_in((args, kwargs)) if isinstance(module, TensorQuantizer) else ()
        if entered and isinstance(result, Tensor):
            self.flow.quantizers.setdefault(self._names[module], []).append(entered[0])
            self._note(result, entered[0])

    def _leave_script(self, module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(module, torch.jit.ScriptModule) and module in self._names:
            given: tuple[Any, dict] = args, {}
            made = list(tensors_in(result))
            self._add_call(module, self._started(module), given, self.values_in(given), made)

    # Functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._silent or op_kind(func) in METADATA:
            return func(*args, **kwargs)
        if func in COMPOSITES:
            with self:
                return opened(func)(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                given = args, kwargs
                self._add_call(func, self._frames[-1], given, self.values_in(args), [result])
            return result
        tensors = list(tensors_in((args, kwargs)))
        values = tuple(self._value(tensor) for tensor in tensors)
        versions = [_version(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        # A parameter that is handed through, as by `weight.contiguous()`, stays what it is.
        made = [tensor for tensor in tensors_in(result) if tensor not in self._owned]
        made += [t for t, old in zip(tensors, versions, strict=True) if _version(t) != old]
        if tensors or made:
            self._add_call(func, self._frames[-1], (args, kwargs), values, made)
        return result

    def _add_call(
        self, function: Any, frame: _Frame, given: Any, inputs: tuple[int, ...], made: list[Tensor]
    ) -> None:
        flow, index = self.flow, len(self.flow.calls)
        op = "script"
        if function is not frame.module:
            op = op_kind(function)
            note_spelling(function)
        site = f"{frame.name}/{op}"
        if any(flow.values[i].dtype.is_floating_point for i in inputs):
            site += f"#{frame.counts[op]}"
            frame.counts[op] += 1
        args, kwargs = _described(given, iter(inputs))
        outputs = tuple(self._new_value(t, index) for t in {id(t): t for t in made}.values())
        where = frame.name, frame.run, site
        flow.calls.append(Call(index, op, function, *where, args, kwargs, inputs, outputs))
        for value in dict.fromkeys(inputs):
            flow._consumers.setdefault(value, []).append(index)

    # Values

    def values_in(self, item: Any) -> tuple[int, ...]:
        return tuple(self._value(tensor) for tensor in tensors_in(item))

    def _value(self, tensor: Tensor) -> int:
        with DisableTorchFunction():
            index, version = self._known.get(tensor, (None, None))
            if index is not None and version == _version(tensor):
                return index
            return self._new_value(tensor, None)

    def _new_value(self, tensor: Tensor, producer: int | None) -> int:
        index = len(self.flow.values)
        name = self._owned.get(tensor) if producer is None else None
        value = Value(index, producer, tuple(tensor.shape), tensor.dtype, name)
        self.flow.values.append(value)
        self._note(tensor, index)
        return index

    def _note(self, tensor: Tensor, value: int) -> None:
        with DisableTorchFunction():
            self._known[tensor] = value, _version(tensor)


def _described(item: Any, values: Iterator[int]) -> Any:
    """Arguments with the tensors, in the order of `tensors_in`, replaced by `Ref`."""
    if isinstance(item, Tensor):
        return Ref(next(values))
    if isinstance(item, Mapping):
        return {key: _described(value, values) for key, value in item.items()}
    if isinstance(item, (tuple, list)):
        parts = [_described(part, values) for part in item]
        return parts if isinstance(item, list) else tuple(parts)
    if isinstance(item, slice):
        return slice(*_described((item.start, item.stop, item.step), values))
    if is_dataclass(item) and not isinstance(item, type):
        return {part.name: _described(getattr(item, part.name), values) for part in fields(item)}
    return item if item is None or item is ... or isinstance(item, _PLAIN) else type(item)


def _version(tensor: Tensor) -> int:
    """A count of the writes to the memory of a tensor; inference tensors do not keep one."""
    return -1 if tensor.is_inference() else tensor._version
