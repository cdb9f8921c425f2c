"""A file system that stops working, or kills the process, at a chosen touch of it."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapterkit.registry.files import Files

CHANGES = (
    "create", "open_update", "open_partial", "open_owned", "write", "truncate", "fsync",
    "fsync_folder", "rename", "link", "unlink", "chmod", "mkdir", "remove_tree",
)  # fmt: skip
READS = ("open", "read", "stat", "lstat", "listdir", "is_locked")


class Counting(Files):
    """Calls `at(name)` before each change; `at` may raise or kill. names: the changes so far."""

    def __init__(self, at: Callable[[int, str], None] = lambda number, name: None) -> None:
        self.names: list[str] = []
        self.at = at

    def __getattribute__(self, name: str) -> object:
        found = super().__getattribute__(name)
        if name not in CHANGES:
            return found

        def counted(*given: object) -> object:
            self.names.append(name)
            self.at(len(self.names), name)
            return found(*given)

        return counted


class Everything(Counting):
    """Calls `at` before each touch of the file system, reads too, and (inside `installed`) before
    each SQL statement; both are counted together."""

    def __getattribute__(self, name: str) -> object:
        found = super().__getattribute__(name)
        if name not in READS:
            return found

        def counted(*given: object) -> object:
            self.hit(name)
            return found(*given)

        return counted

    def hit(self, name: str) -> None:
        self.names.append(name)
        self.at(len(self.names), name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        hit, real = self.hit, sqlite3.connect

        class Connection(sqlite3.Connection):
            def execute(self, *given: object) -> sqlite3.Cursor:
                hit("sql")
                return super().execute(*given)

            def executemany(self, *given: object) -> sqlite3.Cursor:
                hit("sql")
                return super().executemany(*given)

        def connect(place: object, **options: object) -> sqlite3.Connection:
            if not place:  # one of its own, which has no disk that could fail
                return real(place, **options)
            return real(place, **options, factory=Connection)

        sqlite3.connect = connect
        try:
            yield
        finally:
            sqlite3.connect = real


class _Mortal:
    """Beside a class that counts: kills its process at number `last`, a write in the middle."""

    def __init__(self, last: int) -> None:
        super().__init__(self._maybe)
        self.last = last

    def _maybe(self, number: int, name: str) -> None:
        if number == self.last and name != "write":
            die()

    def write(self, file: BinaryIO, data: bytes) -> None:
        if len(self.names) == self.last:
            super().write(file, data[: len(data) // 2])
            die()
        super().write(file, data)


class Dying(_Mortal, Counting):
    """At a change."""


class DyingEverywhere(_Mortal, Everything):
    """At any touch."""


SQL_ERRORS = {
    errno.ENOSPC: ("SQLITE_FULL", "database or disk is full"),
    errno.EIO: ("SQLITE_IOERR_WRITE", "disk I/O error"),
    errno.EPERM: ("SQLITE_READONLY", "attempt to write a readonly database"),
}


def failing(last: int, code: int) -> Everything:
    """Touch number `last` fails once with an error of the system, as SQL has it."""

    def at(number: int, name: str) -> None:
        if number != last:
            return
        if name != "sql":
            raise OSError(code, os.strerror(code))
        symbol, text = SQL_ERRORS[code]
        error = sqlite3.OperationalError(text)
        error.sqlite_errorname = symbol
        raise error

    return Everything(at)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class ReadOnly(Counting):
    def __init__(self) -> None:
        super().__init__(self._refuse)

    def _refuse(self, number: int, name: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def writable(self, path: Path) -> bool:
        return False


def in_child(work: Callable[[], None]) -> bool:
    """Run `work` in a copy of this process; whether it ended by itself, and without an error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child raised"
    return not os.WIFSIGNALED(status)
