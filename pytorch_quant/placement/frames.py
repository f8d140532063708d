"""Modules whose forward runs inside a frame, with no edit of their class.

The class of the module is replaced by a subclass of it that looks the same. It has no state of its
own: what a frame needs lies in the module, as `_call_sites` and `_call_quantizers`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from pytorch_quant.placement.call_sites import QUANTIZERS, CallFrame, CallSites, enclosing_frame

SITES = "_call_sites"
"""The attribute that holds the `CallSites` of a module."""

FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules that in evaluation hand their parameters to one kernel, past all quantizers.

They do not while a mode is active, which makes a frame without sites enough to stop them.
"""


class Framed:
    """Mixin: the calls of this module are its own, not those of the module that runs it."""

    _framed_base: ClassVar[type]

    def __init_subclass__(cls, **_: Any) -> None:
        """Not passed on: registries of subclasses are for the user's classes."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        rebuild, arguments, *state = reduced
        cls, base = type(self), self._framed_base
        # The class has no name that could be imported.
        arguments = tuple(base if argument is cls else argument for argument in arguments)
        return _rebuilt, (base, isinstance(self, Sited), rebuild, arguments), *state


class Sited(Framed):
    """Mixin: calls in the forward of this module may be quantized."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The children, of which a forward that goes through them sees its own only."""
        frame = enclosing_frame()
        hides = frame is not None and frame.module is self and not frame.blind
        for name, child in super().named_children():  # type: ignore[misc]
            if not (hides and name == QUANTIZERS):
                yield name, child


def _beside_the_quantizers(name: str) -> Callable:
    """A method of the container that finds its entries alone, and the quantizers last again."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = self._modules.pop(QUANTIZERS, None)
        try:
            return getattr(super(self._of_own, self), name)(*args, **kwargs)
        finally:
            if held is not None:
                self._modules[QUANTIZERS] = held

    method.__name__ = name
    return method


class _ListOfOwn:
    """Mixin for `nn.Sequential` and `nn.ModuleList`: the quantizers are not one of the entries."""

    _modules: dict[str, nn.Module]
    _framed_base: ClassVar[type]
    _of_own: ClassVar[type]

    __setitem__ = _beside_the_quantizers("__setitem__")
    __delitem__ = _beside_the_quantizers("__delitem__")
    __iadd__ = _beside_the_quantizers("__iadd__")
    add_module = _beside_the_quantizers("add_module")
    append = _beside_the_quantizers("append")
    extend = _beside_the_quantizers("extend")
    insert = _beside_the_quantizers("insert")
    pop = _beside_the_quantizers("pop")

    def _own(self) -> dict[str, nn.Module]:
        return {n: child for n, child in self._modules.items() if n != QUANTIZERS}

    def __len__(self) -> int:
        return len(self._own())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._own().values())

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            # They are always last, which moves no index.
            return super().__getitem__(index)  # type: ignore[misc]
        chosen = list(self._own().items())[index]
        base: Any = self._framed_base
        if issubclass(base, nn.Sequential):
            return base(OrderedDict(chosen))
        return base([child for _, child in chosen])


_ListOfOwn._of_own = _ListOfOwn


class _DictOfOwn:
    """Mixin for `nn.ModuleDict`: the quantizers are not one of the entries."""

    _modules: dict[str, nn.Module]
    _of_own: ClassVar[type]

    clear = _beside_the_quantizers("clear")

    _own = _ListOfOwn._own
    __len__ = _ListOfOwn.__len__

    def __iter__(self) -> Iterator[str]:
        return iter(self._own())  # type: ignore[misc]

    def keys(self) -> Any:
        """The names of the entries."""
        return self._own().keys()  # type: ignore[misc]

    def items(self) -> Any:
        """The entries by name."""
        return self._own().items()  # type: ignore[misc]

    def values(self) -> Any:
        """The entries."""
        return self._own().values()  # type: ignore[misc]


_DictOfOwn._of_own = _DictOfOwn


def framed_class(base: type, sited: bool = False) -> type:
    """The subclass of a class of modules whose instances run inside frames.

    Args:
        base: The class; of a framed class, the class that it was made of counts.
        sited: Its calls can be quantized; otherwise they are merely told apart.
    """
    made_by_torch = base.__module__ == parametrize.__name__
    if made_by_torch and not hasattr(parametrize, base.__name__):
        # The class of one parametrized module. When the last parametrization is removed, torch
        # deletes from it and goes back to its base, which has to be framed as well.
        return _parametrized(base, framed_class(base.__bases__[0], sited))
    origin: Any = base
    if issubclass(base, Framed):
        origin, sited = base._framed_base, sited or issubclass(base, Sited)
    return _make_class(origin, sited)


@functools.cache
def _make_class(base: Any, sited: bool) -> type:
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_framed_base": base,
        "__call__": _calling(base.__call__),
    }
    mixins: tuple[type, ...] = (Framed,)
    if sited:
        mixins = (Sited,)
        if issubclass(base, (nn.Sequential, nn.ModuleList)):
            mixins = (Sited, _ListOfOwn)
        elif issubclass(base, nn.ModuleDict):
            mixins = (Sited, _DictOfOwn)
        namespace["forward"] = _entering(base.forward)
    return type(base)(base.__name__, (*mixins, base), namespace)


@functools.cache
def _parametrized(base: type, framed: type) -> type:
    if base.__bases__[0] is framed:
        return base
    slots = ("__dict__", "__weakref__")
    namespace = {name: part for name, part in vars(base).items() if name not in slots}
    return type(framed)(base.__name__, (framed,), namespace)


def _calling(call: Callable) -> Callable:
    """A call inside of a frame; the hooks count as part of their module."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        sites = self.__dict__.get(SITES)
        if self._compiled_call_impl is not None:
            # After module.compile() the frame belongs into what is compiled: see `_entering`.
            sites = None
        return _in_frame(self, sites, functools.partial(call, self), args, kwargs)

    # The compiler limits how many forms it keeps of one code object; each class has its own.
    __call__.__code__ = __call__.__code__.replace()
    return __call__


def _entering(forward: Callable) -> Callable:
    """A forward that also enters the frame where it is called by itself, as `module.forward(x)`."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = enclosing_frame()
        if frame is not None and frame.module is self:
            return forward(self, *args, **kwargs)
        return _in_frame(self, self.__dict__[SITES], functools.partial(forward, self), args, kwargs)

    # Exporters and tracers name the inputs by it.
    with contextlib.suppress(TypeError, ValueError):
        wrapper.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return wrapper


def _in_frame(
    module: Any, sites: CallSites | None, call: Callable, args: tuple, kwargs: dict[str, Any]
) -> Any:
    outer = enclosing_frame()
    if outer is None:
        return _with_sites(module, sites, call, args, kwargs)
    if torch.compiler.is_dynamo_compiling() and not (outer.compiled or outer.blind):
        # The frame that runs eagerly would count what the compiled code calls.
        raise RuntimeError(
            f"{type(module).__name__} is compiled by itself inside of a module with quantized "
            "calls; use its compile() method, or compile the whole model"
        )
    outer.blind += 1
    try:
        return _with_sites(module, sites, call, args, kwargs)
    finally:
        outer.blind -= 1


def _with_sites(
    module: Any, sites: CallSites | None, call: Callable, args: tuple, kwargs: dict[str, Any]
) -> Any:
    if sites is None:
        return call(*args, **kwargs)
    # Not `with CallFrame(...) as frame`: the compiler binds something else to the name.
    frame = CallFrame(module, sites)
    with frame, _unfused(module):
        result = call(*args, **kwargs)
    frame.finish()
    return result


def _unfused(module: Any) -> contextlib.AbstractContextManager:
    # The compiler answers the question for a mode with no.
    if torch.compiler.is_dynamo_compiling() and isinstance(module, FUSED):
        return _fastpath_off()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _fastpath_off() -> Iterator[None]:
    # Its setter is a function that the compiler does not look into.
    flags: Any = torch.backends.mha
    enabled = flags._is_fastpath_enabled
    flags._is_fastpath_enabled = False
    try:
        yield
    finally:
        flags._is_fastpath_enabled = enabled


def _rebuilt(base: type, sited: bool, rebuild: Callable, arguments: tuple) -> Any:
    module = rebuild(*arguments)
    module.__class__ = framed_class(base, sited)
    return module
