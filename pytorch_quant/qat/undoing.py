"""A change that lasts, or that the end of a `with` block undoes."""

from __future__ import annotations

from collections.abc import Callable


class Undo:
    """What a function of this package returns that has changed a model already.

    Ignore it, and the change lasts; use it in a `with` statement, or call it, to undo the change.

    Args:
        undo: Brings back what was before.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def __call__(self) -> None:
        """Undo the change; a second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *error: object) -> None:
        self()
