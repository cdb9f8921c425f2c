"""What a forward notes for later in the same forward: one model may run in several threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

S = TypeVar("S")
SHARED: Any = object()


class Here(threading.local):
    """Attributes of one thread each; a copy of a model begins with none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Turn:
    """Entered by one thread at a time; a copy of a model has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _Own(Here):
    state: Any = SHARED


class Current(Generic[S]):
    """The state of a part of the engine: the one it was switched to, or the one by which this
    thread routes meanwhile. Compiled code sees the last of either."""

    def __init__(self, start: S) -> None:
        self.shared = self._last = start
        self._own = _Own()

    def switch(self, state: S) -> None:
        self.shared = self._last = state

    @property
    def now(self) -> S:
        if torch.compiler.is_compiling():
            return self._last
        own = self._own.state
        found: S = self.shared if own is SHARED else own
        return found

    def bind(self, state: Any) -> Any:
        """This thread's own state from here on, SHARED for that of all; returns what it was."""
        before, self._own.state = self._own.state, state
        self._last = self.shared if state is SHARED else state
        return before


@contextmanager
def lasting() -> Iterator[None]:
    """For tensors that are made while a model runs, and outlive that: no part of a graph, and of
    use outside of inference mode too."""
    if torch.compiler.is_compiling():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def recompile() -> None:
    """For when a forward was swapped or a hook put on: compiled code looks at neither again."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
