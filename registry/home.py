"""The folder of a registry: its format, its lock, and the catalog kept in step with the log."""

from __future__ import annotations

import sqlite3
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from adapterkit.registry import layout, replacing
from adapterkit.registry.blobs import Blobs, Stamp
from adapterkit.registry.catalog import Catalog, NewerError
from adapterkit.registry.change import Change
from adapterkit.registry.errors import AdapterError, AdapterWarning
from adapterkit.registry.files import Files, storage_errors
from adapterkit.registry.leases import Leases
from adapterkit.registry.locking import Locking
from adapterkit.registry.log import Log
from adapterkit.registry.trash import Trash

# Errors of a catalog that is broken, not of one that is busy or on a full disk.
_BROKEN = ("SQLITE_CORRUPT", "SQLITE_ERROR", "SQLITE_NOTADB", "SQLITE_CONSTRAINT")
# ValueError: text, also that of SQLite's own messages, that is no UTF-8 or no JSON any more.
_UNUSABLE = (sqlite3.DatabaseError, ValueError)
_HINT = "free some space; the catalog can be deleted, and is made again from the log"

T = TypeVar("T")


class Home:
    """`path` need not exist: the first write creates it."""

    def __init__(self, path: Path, files: Files, single_writer: bool = False) -> None:
        self.path, self.files = path, files
        self.locking = Locking(path, files, single_writer)
        self.guard = threading.RLock()
        self.blobs = Blobs(path / "blobs", path / "tmp", files)
        self.leases = Leases(path / "leases", files)
        self.trash = Trash(path / "trash", self.blobs, files)
        self.blobs.keeper = self
        self.log = Log(path / "log", files)
        self._inode: int | None = None  # of the catalog's file
        with self.errors():
            self._made = layout.check(path, files)
            if self._made:
                self.locking.warn()
            self.catalog = self._open_catalog()

    def close(self) -> None:
        self.leases.close()
        with self.guard:
            self.catalog.close()

    def take(self, digests: Iterable[str]) -> None:
        with self.errors():
            self.leases.take(digests)

    def revive(self, digest: str) -> bool:
        with self.errors():
            return self.trash.revive(digest)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Translates those of the system and of SQLite."""
        try:
            with storage_errors(f"the registry {self.path}"):
                yield
        except sqlite3.Error as error:
            message = f"the catalog of {self.path} cannot be used: {error}"
            raise AdapterError(message, hint=_HINT) from error

    def exists(self) -> bool:
        """Now, not only when it was opened."""
        with self.errors():
            self._made = self._made or layout.check(self.path, self.files)
        return self._made

    def create(self) -> None:
        with self.guard, self.errors():
            self.locking.check()
            if not self._made:
                layout.check(self.path, self.files)
                self.blobs.create()
                layout.create(self.path, self.files)
                self._made = True
            self.locking.probe()

    def lock(self) -> AbstractContextManager[None]:
        return self.locking.hold()

    def _open_catalog(self) -> Catalog:
        """From the disk; in memory where there is no registry yet or it cannot be written."""
        if not self._may_write():
            return Catalog(None)
        path = self.path / "catalog.db"
        if path.exists():
            try:
                return self._sound(self._on_disk(path))
            except _UNUSABLE:
                pass  # looked at again with the lock, when nobody is in the middle of making it
        with self.lock():
            return self._make_catalog(path)

    def _may_write(self) -> bool:
        return self._made and not self.locking.only_reading and self.files.writable(self.path)

    def _on_disk(self, path: Path) -> Catalog:
        while True:
            before = replacing.inode(path)
            catalog = Catalog(path, shared=not self.locking.doubt)
            if before in (None, replacing.inode(path)):
                self._inode = replacing.inode(path)
                return catalog
            catalog.close()  # it was replaced meanwhile: the journal is not of what was opened

    def _make_catalog(self, path: Path) -> Catalog:
        try:
            return self._sound(self._on_disk(path))
        except _UNUSABLE as error:
            if not _is_broken(error):
                return Catalog(None)
            newer = isinstance(error, NewerError)
        replacing.delete(path) if newer else replacing.set_aside(path)
        return self._new_catalog(path)

    def _new_catalog(self, path: Path) -> Catalog:
        """In memory where the disk is too full, or fails, for one there."""
        try:
            return self._on_disk(path)
        except sqlite3.DatabaseError:
            return Catalog(None)

    def _sound(self, catalog: Catalog) -> Catalog:
        """Raises sqlite3.DatabaseError when `catalog` was made from another log."""
        try:
            if not self.log.holds(catalog.place()):
                self._warn_shorter()
                raise sqlite3.DatabaseError("the catalog was made from another log")
        except BaseException:
            catalog.close()
            raise
        return catalog

    def _warn_shorter(self) -> None:
        warnings.warn(
            f"the catalog of {self.path} knows more than the log, or another one: it is made anew"
            " from the log",
            AdapterWarning,
            stacklevel=2,
        )

    def rebuild(self) -> None:
        """Make the catalog anew from the log and the blobs.

        The one that is there is replaced when the new one is whole; nobody has to wait meanwhile.
        """
        with self.guard, self.errors():
            if not self._may_write():
                self.catalog.close()
                self.catalog = Catalog(None)
                return self._refresh()
            part = self.path / "tmp" / f"{uuid.uuid4().hex}.part"
            try:
                self._make(part)
                with self.lock():
                    self._make(part)  # what was written since
                    self.catalog.close()
                    replacing.put(part, self.path / "catalog.db", self.files)
                self.catalog = self._open_catalog()
            except BaseException:
                self.catalog.close()
                self.catalog = Catalog(None)  # until the next one who writes
                raise
            finally:
                self.files.unlink(part)
        return None

    def _make(self, part: Path) -> None:
        made = Catalog(part, alone=True)
        try:
            with made.transaction():
                made.catch_up(self.log, self.blobs.read)
        finally:
            made.close()

    def _refresh(self) -> None:
        path = self.catalog.path
        if path is not None and replacing.inode(path) != self._inode:
            self.catalog.close()  # another one has made it anew
            self.catalog = self._open_catalog()
        place, size = self.catalog.place(), self.log.size()
        if size < place.offset:
            self._warn_shorter()
            self.rebuild()
        elif size > place.offset:
            shared = self.catalog.path is not None
            with self.lock() if shared else nullcontext(), self.catalog.transaction():
                self.catalog.catch_up(self.log, self.blobs.read)

    def read(self, query: Callable[[Catalog], T]) -> T:
        """The answer of `query` over an up-to-date catalog.

        A broken one is made anew; where the disk is full, one in memory answers.
        """
        with self.guard, self.errors():
            try:
                self._refresh()
                return query(self.catalog)
            except _UNUSABLE as error:
                broken = _is_broken(error)
            if not broken or not self._is_rebuilt():
                self.catalog.close()
                self.catalog = Catalog(None)
                self._refresh()
            return query(self.catalog)

    def _is_rebuilt(self) -> bool:
        """Not where there is no room for it, or where the log is damaged, which the next one tells
        who reads it."""
        try:
            self.rebuild()
        except AdapterError:
            return False
        return True

    def remember(self, digest: str, stamp: Stamp) -> None:
        """That a blob was read and found good; where that cannot be written, it is read again."""
        with self.guard, suppress(sqlite3.OperationalError):
            self.catalog.set_stamp(digest, stamp)

    @contextmanager
    def write(self) -> Iterator[Change]:
        """Holds the lock and a transaction over an up-to-date catalog."""
        self.create()
        with self.guard, self.errors():
            if self.catalog.path is None:
                self.catalog.close()
                self.catalog = self._open_catalog()
            self.read(lambda catalog: catalog.place())
            with self.lock():
                yield from self._changing()

    def _changing(self) -> Iterator[Change]:
        change: Change | None = None
        try:
            with self.catalog.transaction():
                self.catalog.catch_up(self.log, self.blobs.read)
                change = Change(self)
                yield change
                if change.stale is not None:
                    raise change.stale
        except sqlite3.Error as error:
            if change is None or not change.committed:
                message = f"the catalog of {self.path} cannot be written: {error}"
                raise AdapterError(message) from error
            warnings.warn(
                f"the change is stored, but not yet in the catalog ({error});"
                " the next command repairs that",
                AdapterWarning,
                stacklevel=5,
            )


def _is_broken(error: Exception) -> bool:
    return str(getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")).startswith(_BROKEN)
