"""Adapters that are loaded when they are named, within a budget of memory: those that were named
longest ago make room."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from adapterkit.hub.compose.here import Turn
from adapterkit.registry.errors import InvalidError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(|k|m|g|ki|mi|gi)b?\s*", re.IGNORECASE)
LOADS = 4  # at a time


@dataclass(frozen=True)
class Counters:
    """hits: names that were loaded already; misses: those that had to be; evicted: those that made
    room; loaded: bytes of all that was ever loaded; held: bytes of what is loaded now."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0
    loaded: int = 0
    held: int = 0


def bytes_of(budget: str | int) -> int:
    """4096, "2GiB", "500 MB". Raises InvalidError for anything else, and for nothing at all."""
    found = SIZE.fullmatch(budget) if isinstance(budget, str) else None
    size = budget if isinstance(budget, int) and not isinstance(budget, bool) else 0
    if found is not None:
        size = int(float(found[1]) * UNITS[found[2].lower()])
    if size <= 0:
        raise InvalidError(f"budget is {budget!r}, expected a size such as '2GiB', or bytes")
    return size


class Demand:
    """sizes: bytes of each that was loaded on demand, the one named longest ago first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.sizes: OrderedDict[str, int] = OrderedDict()
        self.counters = Counters()
        self._turn = Turn()
        self._running: dict[str, Future[Any]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Demand:
        """For a copy of a model, which has the same adapters loaded, and loads for itself."""
        made = Demand(self.budget)
        made.sizes, made.counters = OrderedDict(self.sizes), self.counters
        return made

    def named(self, names: Iterable[str]) -> None:
        """They are loaded, and now those that were named last."""
        hits = [name for name in names if name in self.sizes]
        for name in hits:
            self.sizes.move_to_end(name)
        self.counters = replace(self.counters, hits=self.counters.hits + len(hits))

    def made(
        self, names: Collection[str], make: Callable[[str], Any], held: Container[str]
    ) -> dict[str, Any]:
        """What `make` gives for each that is not held by now, several at a time; one that is being
        made for another thread is waited for. It is kept until it is forgotten."""
        with self._turn:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(LOADS, "adapterkit-load")
            for name in names:
                if name not in self._running and name not in held:
                    self._running[name] = self._pool.submit(make, name)
            futures = {name: self._running[name] for name in names if name in self._running}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:  # those that failed are tried again next time
            self.forget(futures)
            raise

    def forget(self, names: Iterable[str]) -> None:
        with self._turn:
            for name in names:
                self._running.pop(name, None)

    def room_for(self, new: dict[str, int], kept: Collection[str], fixed: int) -> Iterator[str]:
        """Names to evict so that new ones fit. new: their bytes; kept: in use; fixed: bytes of
        adapters that are never evicted. Raises InvalidError if nothing makes room for them."""
        free = self.budget - fixed - sum(self.sizes.values()) - sum(new.values())
        gone = []
        for name, size in self.sizes.items():
            if free >= 0:
                break
            if name not in kept:
                gone.append(name)
                free += size
        if free < 0:
            raise InvalidError(
                f"{', '.join(new)} and what is in use need {self.budget - free} bytes, the budget"
                f" is {self.budget}"
            )
        yield from gone

    def loaded(self, name: str, size: int) -> None:
        self.sizes[name] = size
        count = self.counters
        self.counters = replace(count, misses=count.misses + 1, loaded=count.loaded + size)

    def evicted(self) -> None:
        self.counters = replace(self.counters, evicted=self.counters.evicted + 1)

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
