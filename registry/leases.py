"""Leases: what running adds and pulls rely on, told to gc before they look for it.

One file per process and registry, `leases/<32 hex>.part`, with a line `+DIGEST` or `-DIGEST` per
change. It is locked for as long as its owner lives: one that is not locked means nothing.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adapterkit.registry.files import Files

# Where files cannot be locked, an owner that has not been heard of for so long is dead.
SILENCE_SECONDS = 86_400
_LINE = re.compile(rb"([+-])([0-9a-f]{64})\n")


class Leases:
    """Those of this process in the folder `path`. Threads may share it."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path, self.files = path, files
        self.guard, self.local = threading.Lock(), threading.local()
        self.counts: Counter[str] = Counter()
        self.file: BinaryIO | None = None
        self.own: Path | None = None

    def take(self, digests: Iterable[str]) -> None:
        """Until `release`, or the end of the `session` of this thread."""
        wanted = list(digests)
        with self.guard:
            self._write("+", wanted)
            self.counts.update(wanted)
        for session in self._sessions()[-1:]:
            session.extend(wanted)

    def release(self, digests: Iterable[str]) -> None:
        """Those that were taken; the others are passed over."""
        # One that stays, because it cannot be written that it ended, only keeps a blob longer.
        with self.guard, suppress(OSError):
            gone = [digest for digest in digests if self.counts[digest] > 0]
            self.counts.subtract(gone)
            if not +self.counts:
                self._end()
            elif self.file is not None:
                self._write("-", gone)

    @contextmanager
    def session(self) -> Iterator[None]:
        """What is taken inside is released at its end."""
        taken: list[str] = []
        self._sessions().append(taken)
        try:
            yield
        finally:
            self._sessions().pop()
            self.release(taken)

    def close(self) -> None:
        with self.guard, suppress(OSError):
            self._end()

    def _sessions(self) -> list[list[str]]:
        if not hasattr(self.local, "sessions"):
            self.local.sessions = []
        found: list[list[str]] = self.local.sessions
        return found

    def _write(self, sign: str, digests: list[str]) -> None:
        if self.file is None:
            self.files.mkdir(self.path)
            while self.file is None:
                self.own = self.path / f"{uuid.uuid4().hex}.part"
                # None also when gc took it for one that was left behind, in between.
                self.file = self.files.open_owned(self.own)
        self.files.write(self.file, "".join(f"{sign}{d}\n" for d in digests).encode())

    def _end(self) -> None:
        self.counts.clear()
        file, own, self.file, self.own = self.file, self.own, None, None
        if file is not None and own is not None:
            file.close()
            self.files.unlink(own)


def held(path: Path, files: Files) -> set[str]:
    """Every digest that some process relies on. Files of dead ones are removed."""
    found: set[str] = set()
    for name in files.listdir(path) if path.is_dir() else []:
        lease = path / name
        try:
            if _is_dead(lease, files):
                files.unlink(lease)
                continue
            with files.open(lease) as file:
                counts: Counter[bytes] = Counter()
                for sign, digest in _LINE.findall(file.read()):
                    counts[digest] += 1 if sign == b"+" else -1
        except FileNotFoundError:  # its owner has just finished
            continue
        found |= {digest.decode() for digest in +counts}
    return found


def _is_dead(lease: Path, files: Files) -> bool:
    locked = files.is_locked(lease)
    if locked is None:
        return files.stat(lease).st_mtime < time.time() - SILENCE_SECONDS
    return not locked
