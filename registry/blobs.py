"""Bytes named by their sha256: `blobs/sha256/ab/<64 hex>`, mode 0444, never rewritten."""

from __future__ import annotations

import hashlib
import re
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.files import Files, storage_errors

CHUNK = 1 << 20
_HEX = re.compile(r"[0-9a-f]{64}")

Content = Path | bytes | BinaryIO


@dataclass(frozen=True)
class Blob:
    """digest: 64 hex digits. new: whether its bytes had to be stored."""

    digest: str
    size: int
    new: bool


@dataclass(frozen=True)
class Stamp:
    """What a file looked like when its bytes were last hashed."""

    size: int
    mtime_ns: int
    inode: int


def bare(digest: str) -> str:
    """The 64 hex digits of `sha256:HEX` or `HEX`. Raises InvalidError."""
    text = digest.removeprefix("sha256:")
    if not _HEX.fullmatch(text):
        raise InvalidError(f"{digest[:80]!r} is not a sha256 digest")
    return text


class Blobs:
    """A folder of blobs. temp: a folder on the same file system, for bytes not yet checked."""

    def __init__(self, root: Path, temp: Path, files: Files) -> None:
        self.root, self.temp, self.files = root / "sha256", temp, files

    def create(self) -> None:
        for folder in (self.temp, self.root):
            self.files.make_folder(folder)

    def path(self, digest: str) -> Path:
        text = bare(digest)
        return self.root / text[:2] / text

    def stamp(self, digest: str) -> Stamp | None:
        """None when there is no such blob, or something else than a file in its place."""
        try:
            status = self.files.lstat(self.path(digest))
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)

    def intact(self, digest: str) -> bool:
        """Whether the stored bytes are those the name says; reads them all."""
        if self.stamp(digest) is None:
            return False
        with self.files.open(self.path(digest)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == bare(digest)

    def read(self, digest: str) -> bytes:
        """The bytes of a small blob, checked. Raises DamagedError."""
        try:
            with self.files.open(self.path(digest)) as file:
                data = file.read()
        except FileNotFoundError as error:
            raise DamagedError(f"blob {digest[:12]} is missing") from error
        found = hashlib.sha256(data).hexdigest()
        if found != bare(digest):
            raise DamagedError(f"blob {digest[:12]} holds other bytes, of digest {found[:12]}")
        return data

    def put(self, content: Content, digest: str | None = None, size: int | None = None) -> Blob:
        """Store bytes; when `digest` or `size` is given they must agree, else DamagedError.

        A blob that is already there is hashed first, and replaced when it has rotted.
        """
        if digest is not None:
            digest = bare(digest)
        part = self.temp / f"{uuid.uuid4().hex}.part"
        with storage_errors("a blob cannot be stored"):
            try:
                with self.files.create(part) as file:
                    found, length = self._copy(content, file)
                    _compare(found, length, digest, size)
                    new = not self.intact(found)
                    if new:
                        self.files.chmod(part, 0o444)
                        self.files.fsync(file)
                path = self.path(found)
                if new:
                    self.files.mkdir(path.parent)
                    self.files.rename(part, path)
                # Also when it was there: who put it may not have come to this yet.
                for folder in (path.parent, self.root):
                    self.files.fsync_folder(folder)
            finally:
                self.files.unlink(part)
        return Blob(found, length, new)

    def _copy(self, content: Content, target: BinaryIO) -> tuple[str, int]:
        if isinstance(content, bytes):
            self.files.write(target, content)
            return hashlib.sha256(content).hexdigest(), len(content)
        if not isinstance(content, Path):
            return copy_hashed(self.files, content, target)
        if not stat.S_ISREG(self.files.stat(content).st_mode):
            raise InvalidError(f"{str(content)!r} is not a file")
        with self.files.open(content) as source:
            if not self.files.clone(source, target):
                return copy_hashed(self.files, source, target)
        with self.files.open(Path(target.name)) as copied:
            found = hashlib.file_digest(copied, "sha256").hexdigest()
            return found, copied.tell()


def copy_hashed(files: Files, source: BinaryIO, target: BinaryIO) -> tuple[str, int]:
    """Copy what is left of `source`; its sha256 and length."""
    hasher, length = hashlib.sha256(), 0
    while data := source.read(CHUNK):
        hasher.update(data)
        files.write(target, data)
        length += len(data)
    return hasher.hexdigest(), length


def _compare(found: str, length: int, digest: str | None, size: int | None) -> None:
    if size is not None and length != size:
        raise DamagedError(f"a blob of {size} bytes arrived with {length}")
    if digest is not None and found != digest:
        raise DamagedError(f"blob {digest[:12]} arrived with other bytes, of digest {found[:12]}")
