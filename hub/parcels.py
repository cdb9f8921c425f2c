"""What goes to whoever works on a task, wherever that is, and what is done with it there.

The worker's object holds tables and no tensors: it is sent once, and known by its sha256 from then
on. Its files stay where they are; of them a task brings the ranges it reads, as bytes or as a path
and a digest, and whoever lacks something says so and is given it. Nothing else is shared.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.hub.headers import Stored
from adapterkit.hub.made import MemorySource
from adapterkit.hub.sources import ByteSource, FileSource
from adapterkit.registry.errors import AdapterError, DamagedError, NotFoundError

if TYPE_CHECKING:
    from torch import Tensor

# (number of the source, start, stop)
Place = tuple[int, int, int]
Worker = Callable[[Any], Any]
# What decides the bytes of a result.
TOOLS = ("adapterkit", "torch", "bitsandbytes", "numpy")


@dataclass(frozen=True)
class Range:
    """Bytes of a source. data: None where `path`, of `size` bytes, may hold them too."""

    place: Place
    digest: str
    data: bytes | None = field(default=None, repr=False)
    path: Path | None = None
    size: int = 0


@dataclass(frozen=True)
class Parcel:
    """worker: the digest of `body`, which is left out where it may be known. item: pickled, what
    the worker is called with. tools: versions that have to be the same."""

    worker: str
    body: bytes | None = field(repr=False)
    item: bytes = field(repr=False)
    ranges: Sequence[Range]
    tools: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """data: the result, pickled, and its digest. Where there is none, unknown: the worker is, or
    lacking: bytes that could not be read."""

    data: bytes = field(default=b"", repr=False)
    digest: str = ""
    unknown: bool = False
    lacking: Sequence[Place] = ()


class LackingError(Exception):
    """Bytes are read that the task did not bring."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.place = place


class Supply:
    """The bytes that the task at hand brought."""

    def __init__(self) -> None:
        self._held: dict[int, list[tuple[int, bytes]]] = {}

    def fill(self, ranges: Sequence[Range]) -> list[Place]:
        """Those that are not to be had here."""
        self._held, missing = {}, []
        for one in ranges:
            data = one.data if one.data is not None else _local(one)
            if data is None:
                missing.append(one.place)
                continue
            if _digest(data) != one.digest:
                raise DamagedError(f"bytes of a task arrived with other content: {one.place}")
            number, start, _ = one.place
            self._held.setdefault(number, []).append((start, data))
        return missing

    def read(self, number: int, start: int, size: int) -> bytes:
        for first, data in self._held.get(number, ()):
            if first <= start and start + size <= first + len(data):
                return data[start - first : start - first + size]
        raise LackingError((number, start, start + size))


def _local(one: Range) -> bytes | None:
    """The same bytes of a file that is seen here too."""
    if one.path is None:
        return None
    try:
        source = FileSource.open(one.path)
        data = source.read(one.place[1], one.place[2] - one.place[1])
    except (NotFoundError, DamagedError):
        return None
    return data if source.size == one.size and _digest(data) == one.digest else None


@dataclass(frozen=True)
class Carried:
    """A file that lies elsewhere."""

    name: str
    size: int
    number: int
    supply: Supply = field(repr=False)

    def read(self, start: int, size: int) -> bytes:
        return self.supply.read(self.number, start, size) if size else b""


@dataclass(frozen=True, eq=False)
class Packed:
    """A worker as it is sent. sources: by their numbers. tensors: of each, by (start, stop)."""

    digest: str
    body: bytes
    sources: Sequence[ByteSource]
    tensors: Sequence[Mapping[tuple[int, int], str]]

    @classmethod
    def of(cls, worker: Worker) -> Packed:
        file = io.BytesIO()
        packer = _Packer(file, protocol=5)
        packer.dump(worker)
        tensors: list[dict[tuple[int, int], str]] = [{} for _ in packer.sources]
        numbers = {id(source): number for number, source in enumerate(packer.sources)}
        for stored in packer.tensors.values():
            if id(stored.source) in numbers:
                tensors[numbers[id(stored.source)]][stored.start, stored.stop] = stored.key
        body = file.getvalue()
        return cls(_digest(body), body, packer.sources, tensors)

    def places(self, tensors: Sequence[Stored]) -> list[Place]:
        """Of those whose bytes lie in one piece."""
        numbers = {id(source): number for number, source in enumerate(self.sources)}
        return [
            (numbers[id(one.source)], one.start, one.stop)
            for one in tensors
            if id(one.source) in numbers
        ]

    def around(self, place: Place) -> list[Place]:
        """The tensor that a range is a part of, and the constants of the same weight: they are
        read together. The range alone where it is of none."""
        number, start, stop = place
        known = self.tensors[number]
        key = next((k for (a, b), k in known.items() if a <= start and stop <= b), None)
        if key is None:
            return [place]
        stem = key.partition(".weight")[0] + "."
        return [(number, a, b) for (a, b), k in known.items() if k == key or k.startswith(stem)]


class _Packer(pickle.Pickler):
    """Without the files; it remembers them, and the tensors in them."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.sources: list[ByteSource] = []
        self.tensors: dict[int, Stored] = {}
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> tuple[int, str, int] | None:
        if isinstance(obj, Stored):
            self.tensors[id(obj)] = obj
        if not isinstance(obj, FileSource | MemorySource):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.sources)
            self.sources.append(obj)
        return self._numbers[id(obj)], obj.name, obj.size


class _Unpacker(pickle.Unpickler):
    def __init__(self, body: bytes, supply: Supply) -> None:
        super().__init__(io.BytesIO(body))
        self._supply = supply

    def persistent_load(self, pid: tuple[int, str, int]) -> Carried:
        number, name, size = pid
        return Carried(name, size, number, self._supply)


class _Results(pickle.Pickler):
    """Of a tensor only its own values: what it is a view of stays."""

    def reducer_override(self, obj: Any) -> Any:
        from torch import Tensor

        if not isinstance(obj, Tensor):
            return NotImplemented
        import torch

        flat: Any = obj.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (flat.tobytes(), obj.dtype, tuple(obj.shape))


def _tensor(data: bytes, dtype: Any, shape: tuple[int, ...]) -> Tensor:
    import torch

    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


# The worker that a thread has met last: threads must not share one, as it is given bytes.
_met = threading.local()


def work(parcel: Parcel) -> Answer:
    """Runs wherever the executor says, as often as it says: the answer is always the same."""
    _require_same(parcel.tools)
    if getattr(_met, "digest", "") != parcel.worker:
        if parcel.body is None:
            return Answer(unknown=True)
        supply = Supply()
        _met.worker, _met.supply = _Unpacker(parcel.body, supply).load(), supply
        _met.digest = parcel.worker
    if missing := _met.supply.fill(parcel.ranges):
        return Answer(lacking=missing)
    from adapterkit.hub.reduce import single_thread

    try:
        with single_thread():
            made = _met.worker(pickle.loads(parcel.item))
    except LackingError as error:
        return Answer(lacking=(error.place,))
    finally:
        _met.supply.fill(())
    file = io.BytesIO()
    _Results(file, protocol=5).dump(made)
    data = file.getvalue()
    return Answer(data, _digest(data))


def opened(answer: Answer) -> Any:
    """The result. Raises DamagedError if it is not what was sent."""
    if _digest(answer.data) != answer.digest:
        raise DamagedError("the result of a task arrived with other bytes than were sent")
    return pickle.loads(answer.data)


@cache
def tools() -> dict[str, str]:
    return {name: version(name) for name in TOOLS}


def _require_same(wanted: Mapping[str, str]) -> None:
    mine = tools()
    other = [f"{name} {mine[name]} for {v}" for name, v in wanted.items() if mine[name] != v]
    if other:
        raise AdapterError(
            f"a worker has {', '.join(other)}: its results would differ",
            hint="install the same versions on every machine",
        )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
