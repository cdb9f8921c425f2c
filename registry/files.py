"""Every touch of the file system by the store goes through one object, so that tests can record
it, fail it and cut the power in it. Writes are unbuffered."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from adapterkit.registry.errors import AdapterError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# ioctl of linux/fs.h: share the extents of one file with another, copied when either is written
_FICLONE = 0x40049409
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_READ = 1 << 16
# What a file system answers that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Files:
    """The real file system."""

    def create(self, path: Path) -> BinaryIO:
        """A new file, to be written; FileExistsError when there is one."""
        return path.open("x+b", buffering=0)

    def open(self, path: Path) -> BufferedReader:
        return path.open("rb")

    def read(self, path: Path | str) -> bytes:
        """All of a small file; without what a file object costs, as a catalog is made of many."""
        number = os.open(path, os.O_RDONLY | _BINARY)
        try:
            parts = []
            while data := os.read(number, _READ):
                parts.append(data)
            return b"".join(parts)
        finally:
            os.close(number)

    def open_update(self, path: Path) -> BinaryIO:
        """An existing file, to be written in place."""
        return path.open("r+b", buffering=0)

    def open_partial(self, path: Path) -> BinaryIO | None:
        """A file to go on writing, new or as somebody left it; None while another has it, or where
        that cannot be told."""
        number = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o644)
        file = os.fdopen(number, "r+b", buffering=0)
        try:
            # Whoever had it may have finished and moved it away in between.
            if _lock(file) and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:
            pass
        file.close()
        return None

    def open_owned(self, path: Path) -> BinaryIO | None:
        """A new file that is locked as long as its owner lives; None when it was taken away
        meanwhile. Where files cannot be locked, an ordinary one."""
        file = self.create(path)
        if _lock(file) is False or not path.exists():
            file.close()
            return None
        return file

    def is_locked(self, path: Path) -> bool | None:
        """Whether its owner lives; None where that cannot be told."""
        with self.open_update(path) as file:
            free = _lock(file)
        return None if free is None else not free

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]

    def truncate(self, file: BinaryIO, size: int) -> None:
        file.truncate(size)

    def clone(self, source: BinaryIO, target: BinaryIO) -> bool:
        """Whether `target` now shares the bytes of `source` (btrfs, xfs, ...)."""
        if fcntl is None:
            return False
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        except OSError:
            return False
        return True

    def fsync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())

    def fsync_folder(self, path: Path) -> None:
        if os.name == "nt":  # a folder cannot be opened there, and needs no sync
            return
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """FileExistsError when `target` exists."""
        target.hardlink_to(source)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)

    def chmod(self, path: Path, mode: int) -> None:
        path.chmod(mode)

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def make_folder(self, path: Path) -> None:
        """With its parents, each made durable in the folder that holds it."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            self.mkdir(folder)
            self.fsync_folder(folder.parent)
        if not missing:  # made by another process, perhaps just now
            self.fsync_folder(path.parent)

    def stat(self, path: Path) -> os.stat_result:
        return path.stat()

    def lstat(self, path: Path) -> os.stat_result:
        return path.lstat()

    def listdir(self, path: Path) -> list[str]:
        return sorted(child.name for child in path.iterdir())

    def file_system(self, path: Path) -> str:
        """Its type, as `mount` calls it; '' where the system does not say."""
        there = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
        device = there.stat().st_dev
        mark = f" {os.major(device)}:{os.minor(device)} " if hasattr(os, "major") else ""
        try:
            mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        kinds = [line.partition(" - ")[2].split(" ")[0] for line in mounts if mark in line]
        return kinds[-1] if kinds else ""

    def locks_work(self, folder: Path) -> bool:
        """Whether a file that is locked cannot be locked again."""
        if fcntl is None:
            return True
        path = folder / f"{uuid.uuid4().hex}.part"
        with self.create(path) as first, self.open_update(path) as second:
            try:
                return _lock(first) is True and _lock(second) is False
            finally:
                self.unlink(path)

    def writable(self, path: Path) -> bool:
        return os.access(path, os.W_OK)


def _lock(file: BinaryIO) -> bool | None:
    """Whether `file` is locked now, for this process; None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def write_new(files: Files, path: Path, data: bytes, temp: Path) -> None:
    """Put `data` at `path`, whole and durable, replacing what is there; `temp`: a folder on the
    same file system."""
    part = temp / f"{uuid.uuid4().hex}.part"
    try:
        with files.create(part) as file:
            files.write(file, data)
            files.fsync(file)
        files.rename(part, path)
    except BaseException:
        files.unlink(part)
        raise
    files.fsync_folder(path.parent)


_HINTS = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some space and try again",
    errno.EACCES: "another place: --home or ADAPTERKIT_HOME",
    errno.EROFS: "another place: --home or ADAPTERKIT_HOME",
}


@contextmanager
def storage_errors(what: str, kind: type[AdapterError] = AdapterError) -> Iterator[None]:
    """Translates an error of the operating system; `what`: the subject of the message."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        hint = _HINTS.get(error.errno or 0)
        raise kind(f"{what}: {error.strerror or error}{place}", hint=hint) from error
