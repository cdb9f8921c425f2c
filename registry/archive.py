"""One file that holds a registry. Read as a stranger's: strictly, in order, every byte hashed.

    adapterkit-backup 1
    file log 1234          then that many bytes
    file remotes.json 56   likewise, where there is one
    blob <64 hex> 789      likewise, for each blob
    end <64 hex>           the sha256 of everything before this line
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from adapterkit.registry.blobs import Progress
from adapterkit.registry.errors import AdapterError, DamagedError
from adapterkit.registry.files import Files
from adapterkit.registry.hashing import CHUNK

VERSION = 1
LOG, REMOTES = "log", "remotes.json"
_FIRST = re.compile(rb"adapterkit-backup (\d{1,9})\n")
_ENTRY = re.compile(rb"(?:file (log|remotes\.json)|blob ([0-9a-f]{64})) (\d{1,16})\n")
_END = re.compile(rb"end ([0-9a-f]{64})\n")
_MAX_LINE = 200


class Writer:
    def __init__(self, files: Files, file: BinaryIO) -> None:
        self.files, self.file, self.hasher = files, file, hashlib.sha256()
        self._write(f"adapterkit-backup {VERSION}\n".encode())

    def add(self, name: str, size: int, source: BinaryIO, progress: Progress) -> str:
        """`size` bytes of `source`; their sha256. Raises DamagedError when it has fewer."""
        kind = "file" if name in (LOG, REMOTES) else "blob"
        self._write(f"{kind} {name} {size}\n".encode())
        hasher, left = hashlib.sha256(), size
        while left:
            data = source.read(min(CHUNK, left))
            if not data:
                raise DamagedError(f"{name[:12]} ends {left} bytes early")
            hasher.update(data)
            self._write(data)
            left -= len(data)
            progress(len(data))
        return hasher.hexdigest()

    def end(self) -> None:
        self.files.write(self.file, f"end {self.hasher.hexdigest()}\n".encode())

    def _write(self, data: bytes) -> None:
        self.hasher.update(data)
        self.files.write(self.file, data)


class Entry:
    """The bytes of one entry, to be read before the next one is asked for."""

    def __init__(self, archive: Archive, name: str, size: int) -> None:
        self.archive, self.name, self.size, self.left = archive, name, size, size

    def read(self, size: int = CHUNK) -> bytes:
        """b"" at the end. Raises DamagedError when the archive ends before it."""
        data = self.archive.take(min(size, self.left))
        if not data and self.left and size:
            raise self.archive.damaged(f"ends in the middle of {self.name[:12]}")
        self.left -= len(data)
        return data

    def stream(self) -> BinaryIO:
        """For what only reads until the end."""
        return cast(BinaryIO, self)


class Archive:
    """name: what messages call it."""

    def __init__(self, file: BinaryIO, name: Path) -> None:
        self.file, self.name, self.hasher = file, name, hashlib.sha256()
        line = file.readline(_MAX_LINE)
        found = _FIRST.fullmatch(line)
        if found is None:
            raise DamagedError(f"{name} is not a backup of a registry")
        if int(found[1]) > VERSION:
            raise AdapterError(
                f"{name} has format {int(found[1])}, newer than {VERSION}",
                hint="upgrade adapterkit: pip install -U adapterkit",
            )
        self.hasher.update(line)

    def entries(self) -> Iterator[Entry]:
        """In order. Raises DamagedError for anything but a whole archive, at the latest at its
        end: nothing that came before is to be believed until then."""
        while True:
            line = self.file.readline(_MAX_LINE)
            found = _ENTRY.fullmatch(line)
            if found is None:
                break
            self.hasher.update(line)
            entry = Entry(self, (found[1] or found[2]).decode(), int(found[3]))
            yield entry
            while entry.read():
                pass
        end = _END.fullmatch(line)
        if end is None:
            raise self.damaged("holds a line that is none of a backup" if line else "ends early")
        if end[1].decode() != self.hasher.hexdigest():
            raise self.damaged("has been changed: its digest is another one")
        if self.file.read(1):
            raise self.damaged("goes on after its end")

    def take(self, size: int) -> bytes:
        data = self.file.read(size)
        self.hasher.update(data)
        return data

    def damaged(self, what: str) -> DamagedError:
        return DamagedError(f"the backup {self.name} {what}")
