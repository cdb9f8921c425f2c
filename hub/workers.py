"""Tasks on an executor: a bounded number at a time, their results in order.

The executor is the caller's: a pool of this machine, or of many. A task may run anywhere and more
than once; what it reads is sent with it (see `parcels`), what it makes comes back.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from adapterkit.hub.headers import Stored
from adapterkit.hub.parcels import (
    Answer,
    Packed,
    Parcel,
    Place,
    Range,
    Worker,
    opened,
    tools,
    work,
)
from adapterkit.hub.sources import FileSource
from adapterkit.registry.errors import AdapterError

# Tasks under way, and the bytes they read and make: bounds the memory here.
AHEAD = 64
BUDGET = 1 << 30
# Bytes that are sent at once; of a file, more are first looked for where the task runs.
SMALL = 1 << 20


@dataclass
class Task:
    """item: what the worker is called with. reads: tensors that it surely does. size: bytes that
    it reads and makes."""

    item: Any
    reads: Sequence[Stored] = ()
    size: int = 0
    places: dict[Place, None] = field(default_factory=dict)


class Crew:
    """One worker, on every machine of the executor."""

    def __init__(self, executor: Executor, worker: Worker) -> None:
        self._executor, self._packed = executor, Packed.of(worker)
        self._unseen: set[int] = set()  # sources that not everybody can read
        self._running: dict[Future[Answer], int] = {}

    def results(self, tasks: Sequence[Task]) -> Iterator[Any]:
        """One for each task, in order. Raises what the worker raises."""
        done: dict[int, Future[Answer]] = {}
        sent = held = 0
        try:
            for number, task in enumerate(tasks):
                while number not in done:
                    while sent < len(tasks) and (sent == number or _has_room(sent - number, held)):
                        self._send(sent, tasks[sent])
                        held += tasks[sent].size
                        sent += 1
                    self._collect(tasks, done)
                yield opened(done.pop(number).result())
                held -= task.size
        finally:
            for future in self._running:
                future.cancel()

    def _collect(self, tasks: Sequence[Task], done: dict[int, Future[Answer]]) -> None:
        """Waits for an answer; who lacks something is sent it."""
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            number = self._running.pop(future)
            answer = None if future.cancelled() or future.exception() else future.result()
            if answer is None or not (answer.unknown or answer.lacking):
                done[number] = future
                continue
            task = tasks[number]
            for place in answer.lacking:
                if place in task.places:
                    self._unseen.add(place[0])
                task.places.update(dict.fromkeys(self._packed.around(place)))
            self._send(number, task, whole=answer.unknown)

    def _send(self, number: int, task: Task, *, whole: bool = False) -> None:
        """whole: with the worker itself."""
        task.places = task.places or dict.fromkeys(self._packed.places(task.reads))
        parcel = Parcel(
            self._packed.digest,
            self._packed.body if whole else None,
            pickle.dumps(task.item),
            [self._range(place) for place in task.places],
            tools(),
        )
        self._running[self._executor.submit(work, parcel)] = number

    def _range(self, place: Place) -> Range:
        number, start, stop = place
        source = self._packed.sources[number]
        data = source.read(start, stop - start)
        digest = hashlib.sha256(data).hexdigest()
        if len(data) > SMALL and isinstance(source, FileSource) and number not in self._unseen:
            return Range(place, digest, path=source.path.absolute(), size=source.size)
        return Range(place, digest, data)


def _has_room(count: int, size: int) -> bool:
    return count < AHEAD and size < BUDGET


@contextmanager
def unbroken(hint: str) -> Iterator[None]:
    """For a process of a pool that dies, which takes the pool with it."""
    try:
        yield
    except BrokenExecutor as error:
        raise AdapterError(
            "a process of the pool died, and a pool of processes does not go on without it",
            hint=hint,
        ) from error
