"""One safetensors file, written tensor by tensor: its header is reserved and comes last.

Blocks are hashed, written and put on the disk by a thread each, while the next are computed.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from torch import Tensor

from adapterkit.hub.blend.factors import Factors
from adapterkit.hub.headers import DTYPE_BITS
from adapterkit.hub.quant.packing import NAMES
from adapterkit.registry.files import Files
from adapterkit.registry.hashing import CHUNK

# Blocks that may wait to be hashed and written: bounds the memory.
WAITING = 4
# Bytes after which they are put on the disk, so that little is left to wait for at the end.
SYNCED = 1 << 27
METADATA = {"format": "pt"}
# Above any offset, so that no header gets longer than what was reserved.
FAR = 10**15


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is made: size in bytes, at most."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Spec:
        size = tensor.numel() * tensor.element_size()
        return cls(name, NAMES[tensor.dtype], tuple(tensor.shape), size)


@dataclass(frozen=True)
class Written:
    """size: of the file, header: of what is not data. digest: sha256 over the data, then the
    header."""

    size: int
    header: int
    digest: str
    names: tuple[str, ...]


class Sink(Protocol):
    """What takes the tensors of a file, in its order."""

    def add(self, spec: Spec, blocks: Iterable[memoryview]) -> None:
        """One tensor. spec.size: exact."""
        ...

    def add_tensor(self, name: str, tensor: Tensor) -> None: ...

    def add_factors(self, row: str, factors: Factors) -> None:
        """Of the correction of a module; they come into a file of their own."""
        ...


class ShardWriter:
    """packs: tensors whose size is no multiple of 8 come last, so that all are aligned."""

    def __init__(self, files: Files, file: BinaryIO, reserved: int, packs: bool) -> None:
        self._files, self._file, self._reserved, self._packs = files, file, reserved, packs
        self.factors: dict[str, Factors] = {}
        self._hash = hashlib.sha256()
        self._entries: dict[str, Any] = {}
        self._late: list[tuple[Spec, bytes]] = []
        self._end = 0
        self._waiting: deque[list[Future[None]]] = deque()
        self._hashing, self._writing, self._syncing = (ThreadPoolExecutor(1) for _ in range(3))
        self._synced: Future[None] | None = None
        self._unsynced = 0
        file.seek(8 + reserved)

    def add(self, spec: Spec, blocks: Iterable[memoryview]) -> None:
        if self._packs and spec.size % 8:
            self._late.append((spec, b"".join(blocks)))
            return
        self._enter(spec)
        for block in blocks:
            self._put(block)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        self.add(Spec.of(name, tensor), [as_bytes(tensor)])

    def add_factors(self, row: str, factors: Factors) -> None:
        self.factors[row] = factors

    def _enter(self, spec: Spec) -> None:
        offsets = [self._end, self._end + spec.size]
        self._entries[spec.name] = entry(spec, offsets)
        self._end += spec.size

    def _put(self, block: memoryview) -> None:
        while len(self._waiting) >= WAITING:
            self._wait()
        hashed = self._hashing.submit(self._hash.update, block)
        self._waiting.append([hashed, self._writing.submit(self._write, block)])

    def _wait(self) -> None:
        for done in self._waiting.popleft():
            done.result()

    def _write(self, block: memoryview) -> None:
        self._files.write(self._file, block)
        self._unsynced += len(block)
        if self._unsynced >= SYNCED and (self._synced is None or self._synced.done()):
            self._unsynced = 0
            self._synced = self._syncing.submit(self._files.fsync, self._file)

    def finish(self) -> Written:
        """The header, and everything on the disk."""
        for spec, data in sorted(self._late, key=lambda each: -DTYPE_BITS[each[0].dtype]):
            self._enter(spec)
            self._put(memoryview(data))
        text = header(self._entries).ljust(self._reserved)
        head = self._reserved.to_bytes(8, "little") + text
        while self._waiting:
            self._wait()
        if self._synced is not None:
            self._synced.result()
        self._hash.update(head)
        self._file.seek(0)
        self._files.write(self._file, head)
        self._files.fsync(self._file)
        names = tuple(self._entries)
        start = 8 + self._reserved
        return Written(start + self._end, start, self._hash.hexdigest(), names)

    def close(self) -> None:
        for thread in (self._hashing, self._writing, self._syncing):
            thread.shutdown(wait=True, cancel_futures=True)


@contextmanager
def shard_writer(
    files: Files, path: Path, specs: Iterable[Spec], *, packs: bool
) -> Iterator[ShardWriter]:
    entries: dict[str, Any] = {}
    end = FAR if packs else 0
    for spec in specs:
        entries[spec.name] = entry(spec, [end, end + spec.size])
        end += spec.size
    with files.create(path) as file:
        writer = ShardWriter(files, file, len(header(entries)), packs)
        try:
            yield writer
        finally:
            writer.close()


def entry(spec: Spec, offsets: list[int]) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}


def header(entries: Mapping[str, Any]) -> bytes:
    found = json.dumps({"__metadata__": METADATA, **entries}, separators=(",", ":")).encode()
    return found + b" " * (-len(found) % 8)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor that nobody changes any more."""
    import torch

    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def digest_of(files: Files, path: Path) -> tuple[int, str]:
    """(size, digest) of a shard, as `Written` has them."""
    found = hashlib.sha256()
    with files.open(path) as file:
        first = file.read(8)
        head = file.read(int.from_bytes(first, "little"))
        while data := file.read(CHUNK):
            found.update(data)
        found.update(first + head)
        return file.tell(), found.hexdigest()
