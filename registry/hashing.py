"""Bytes hashed on their way."""

from __future__ import annotations

import hashlib
from typing import BinaryIO, Protocol

from adapterkit.registry.errors import DamagedError
from adapterkit.registry.files import Files

CHUNK = 1 << 20


class Hasher(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def hash_start(file: BinaryIO) -> tuple[Hasher, int]:
    """The hash and the length of what is in `file`; leaves it at its end."""
    hasher = hashlib.sha256()
    while data := file.read(CHUNK):
        hasher.update(data)
    return hasher, file.tell()


def copy_hashed(files: Files, source: BinaryIO, target: BinaryIO) -> tuple[str, int]:
    """Copy what is left of `source`; its sha256 and length."""
    hasher, length = hashlib.sha256(), 0
    while data := source.read(CHUNK):
        hasher.update(data)
        files.write(target, data)
        length += len(data)
    return hasher.hexdigest(), length


def compare(found: str, length: int, digest: str | None, size: int | None) -> None:
    if size is not None and length != size:
        raise DamagedError(f"a blob of {size} bytes arrived with {length}")
    if digest is not None and found != digest:
        raise DamagedError(f"blob {digest[:12]} arrived with other bytes, of digest {found[:12]}")
