"""`with quantizer.intercepted(handler)`: for a while, something else happens at a quantizer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Proceed = Callable[[Tensor], Tensor]
Handler = Callable[[Tensor, Proceed], Tensor]

# Threads may intercept the same quantizer.
_LOCK = threading.Lock()


class Intercepted(nn.Module):
    """The stack of handlers of a `TensorQuantizer`."""

    # The innermost first. A tuple that is replaced, so that a call in another thread keeps its own.
    _handlers: tuple[Handler, ...] = ()

    @contextmanager
    def intercepted(self, handler: Handler) -> Iterator[None]:
        """Let `handler(x, proceed)` give what the quantizer returns, inside of the block.

        `x` is the tensor as it comes to the quantizer, and `proceed(x)` does what the quantizer
        would do. Handlers stack: a later one stands around those before, and `proceed` calls them.
        A copy of the quantizer, also by pickle, has none. A recurrent layer whose quantizers are
        all off does not call them.

        Args:
            handler: If it has a method `quantizer_changed`, that is called whenever a field, a
                buffer or the handlers of the quantizer change.
        """
        self._replace_handlers(lambda present: (*present, handler))
        try:
            yield
        finally:
            self._replace_handlers(lambda present: _without(present, handler))

    def _replace_handlers(self, change: Callable[[tuple], tuple]) -> None:
        with _LOCK:
            self._changed()
            self.__dict__["_handlers"] = change(self._handlers)
            if not self._handlers:
                # Back to that of the class, which compiled code has been made for.
                del self.__dict__["_handlers"]

    def _changed(self) -> None:
        """Tell handlers that what the quantizer gives may be another from now on."""
        for handler in self._handlers:
            told = getattr(handler, "quantizer_changed", None)
            if told is not None:
                told()

    def _process(self, inputs: Tensor) -> Tensor:
        """What the quantizer does when nothing intercepts it."""
        raise NotImplementedError

    def _within(self, handlers: Sequence[Handler]) -> Proceed:
        """What the quantizer does inside of these handlers, the innermost first."""
        proceed: Proceed = self._process
        for handler in handlers:
            proceed = _around(handler, proceed)
        return proceed

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which nothing intercepts."""
        return {name: value for name, value in self.__dict__.items() if name != "_handlers"}


def _around(handler: Handler, proceed: Proceed) -> Proceed:
    return lambda x: handler(x, proceed)


def _without(handlers: tuple[Handler, ...], handler: Handler) -> tuple[Handler, ...]:
    last = max(i for i, present in enumerate(handlers) if present is handler)
    return handlers[:last] + handlers[last + 1 :]
