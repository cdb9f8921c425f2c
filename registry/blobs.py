"""Bytes named by their sha256: `blobs/sha256/ab/<64 hex>`, mode 0444, never rewritten."""

from __future__ import annotations

import hashlib
import re
import stat
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from adapterkit.registry.errors import AdapterError, DamagedError, InvalidError
from adapterkit.registry.files import Files, storage_errors
from adapterkit.registry.hashing import CHUNK, Hasher, compare, copy_hashed, hash_start

_HEX = re.compile(r"[0-9a-f]{64}")

Content = Path | bytes | BinaryIO
Fetch = Callable[[int], BinaryIO]
Progress = Callable[[int], None]


class Keeper(Protocol):
    """Who sees to it that nobody takes away what is being put here."""

    def take(self, digests: Iterable[str]) -> None: ...
    def revive(self, digest: str) -> bool: ...


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
    """A folder of blobs. temp: a folder on the same file system, for bytes not yet checked.

    error: what an error of the operating system is raised as.
    """

    def __init__(
        self, root: Path, temp: Path, files: Files, error: type[AdapterError] = AdapterError
    ) -> None:
        self.root, self.temp, self.files, self.error = root / "sha256", temp, files, error
        self.keeper: Keeper | None = None

    def create(self) -> None:
        for folder in (self.temp, self.root):
            self.files.make_folder(folder)

    def path(self, digest: str) -> Path:
        text = bare(digest)
        return self.root.joinpath(text[:2], text)

    def stamp(self, digest: str) -> Stamp | None:
        """None when there is no such blob, or something else than a file in its place."""
        with storage_errors(f"blob {digest[:12]} cannot be read", self.error):
            try:
                status = self.files.lstat(self.path(digest))
            except FileNotFoundError:
                return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)

    def intact(self, digest: str) -> bool:
        """Whether the stored bytes are those the name says; reads them all."""
        with storage_errors(f"blob {digest[:12]} cannot be read", self.error):
            if self.stamp(digest) is None:
                return False
            with self.files.open(self.path(digest)) as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == bare(digest)

    def read(self, digest: str) -> bytes:
        """The bytes of a small blob, checked. Raises DamagedError."""
        with storage_errors(f"blob {digest[:12]} cannot be read", self.error):
            try:
                # As text: to make a path of it takes as long as to open the file.
                data = self.files.read(f"{self.root}/{bare(digest)[:2]}/{bare(digest)}")
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
        with storage_errors("a blob cannot be stored", self.error):
            try:
                with self.files.create(part) as file:
                    found, length = self._copy(content, file)
                    compare(found, length, digest, size)
                    new = self._keep(part, file, found)
            finally:
                self.files.unlink(part)
        return Blob(found, length, new)

    def receive(
        self, digest: str, size: int, fetch: Fetch, progress: Progress = lambda size: None
    ) -> Blob:
        """Store the blob that `fetch(start)` gives from byte `start` on.

        Goes on where an earlier call was interrupted; what that left is checked with the rest.
        progress: told the size of each part. Raises DamagedError when it is not that blob.
        """
        digest = bare(digest)
        with storage_errors("a blob cannot be stored", self.error):
            self._claim_name(digest)
            if self.intact(digest):
                progress(size)
                return Blob(digest, size, False)
            part, file = self._claim(digest)
            try:
                with file:
                    self._fill(file, digest, size, fetch, progress)
                    new = self._keep(part, file, digest)
            except BaseException as error:
                # A partial blob under its own name is gone on with; others would only lie there.
                if isinstance(error, DamagedError) or part.stem != digest:
                    self.files.unlink(part)
                raise
        return Blob(digest, size, new)

    def _claim(self, digest: str) -> tuple[Path, BinaryIO]:
        part = self.temp / f"{digest}.part"
        file = self.files.open_partial(part)
        if file is not None:
            return part, file
        part = self.temp / f"{uuid.uuid4().hex}.part"
        return part, self.files.create(part)

    def _fill(
        self, file: BinaryIO, digest: str, size: int, fetch: Fetch, progress: Progress
    ) -> None:
        hasher, start = hash_start(file)
        if start > size:
            hasher, start = self._restart(file)
        while True:
            progress(start)
            with fetch(start) as source:
                length = start + self._append(source, file, size - start, hasher, progress)
            if not start or hasher.hexdigest() == digest:
                return compare(hasher.hexdigest(), length, digest, size)
            progress(-length)  # what had been left there was not the beginning of this blob
            hasher, start = self._restart(file)

    def _restart(self, file: BinaryIO) -> tuple[Hasher, int]:
        self.files.truncate(file, 0)
        file.seek(0)
        return hashlib.sha256(), 0

    def _append(
        self, source: BinaryIO, target: BinaryIO, size: int, hasher: Hasher, progress: Progress
    ) -> int:
        """Copy up to `size` bytes and, to be found out, one more."""
        length = 0
        while length <= size and (data := source.read(min(CHUNK, size - length + 1))):
            hasher.update(data)
            self.files.write(target, data)
            length += len(data)
            progress(len(data))
        return length

    def _keep(self, part: Path, file: BinaryIO, digest: str) -> bool:
        """Move checked bytes to their place; whether they had to be."""
        self._claim_name(digest)
        path, new = self.path(digest), not self.intact(digest)
        if new:
            self.files.chmod(part, 0o444)
            self.files.fsync(file)
            self.files.mkdir(path.parent)
            self.files.rename(part, path)
        else:
            self.files.unlink(part)
        self.settle([digest])
        return new

    def _claim_name(self, digest: str) -> None:
        """Before the blob is looked for: what is found then is not taken away."""
        if self.keeper is not None:
            self.keeper.take([digest])
            self.keeper.revive(digest)

    def find(self, content: Path) -> Blob | None:
        """The blob of the bytes in a file, if it is there and intact; nothing is written."""
        with storage_errors("a blob cannot be looked for", self.error):
            with self.files.open(content) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                length = file.tell()
            self._claim_name(digest)
            if not self.intact(digest):
                return None
            self.settle([digest])
        return Blob(digest, length, False)

    def settle(self, digests: Iterable[str]) -> None:
        """Make the names of blobs that are there durable: whoever put them may not have come to
        that yet."""
        for folder in {self.path(digest).parent for digest in digests}:
            self.files.fsync_folder(folder)
        self.files.fsync_folder(self.root)

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
