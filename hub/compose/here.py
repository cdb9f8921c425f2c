"""What a forward notes for later in the same forward: one model may run in several threads."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

import torch

S = TypeVar("S")
SHARED: Any = object()


class Here(threading.local):
    """Attributes of one thread each; a copy of a model begins with none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _Own(Here):
    state: Any = SHARED


class Current(Generic[S]):
    """The state of a part of the engine: the one it was switched to, or the one by which this
    thread routes meanwhile."""

    def __init__(self, start: S) -> None:
        self.shared = start
        self._own = _Own()

    @property
    def now(self) -> S:
        if torch.compiler.is_compiling():  # compiled code has one routing at a time
            return self.shared
        own = self._own.state
        found: S = self.shared if own is SHARED else own
        return found

    def bind(self, state: Any) -> Any:
        """This thread's own state from here on, SHARED for that of all; returns what it was."""
        before, self._own.state = self._own.state, state
        return before
