"""The catalog: SQLite tables made from the log, to answer quickly. It can always be deleted."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.registry.apply import apply
from adapterkit.registry.blobs import Stamp
from adapterkit.registry.indexing import index_manifest
from adapterkit.registry.log import Log, Place, Record
from adapterkit.registry.migrations import STEPS, migrate
from adapterkit.registry.tables import Gathered, ReadBlob, Tables

if TYPE_CHECKING:
    from sqlite_utils import Database

BUSY_SECONDS = 60
# In KiB, used when needed: ids lie everywhere, so that making a large catalog touches all pages.
CACHE = -64 * 1024
# Of one of its own: verify has two.
OWN_CACHE = -24 * 1024


class NewerError(sqlite3.DatabaseError):
    """It is one of a later program."""


class Catalog:
    """path: the database file, or None for one of its own, in memory as far as it is small.

    shared: whether other processes may have it open; where memory cannot be shared with them, they
    must not. alone: nobody knows of the file yet, and it does not have to survive a crash.
    """

    def __init__(self, path: Path | None, shared: bool = True, alone: bool = False) -> None:
        from sqlite_utils import Database

        self.path = path
        connection = sqlite3.connect(
            path or "",
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self.db: Database = Database(connection, execute_plugins=False)
            self.db.execute("PRAGMA busy_timeout = 60000")
            self._open("MEMORY" if alone else "WAL" if shared else "DELETE", alone)
        except BaseException:
            connection.close()
            raise

    def _open(self, journal: str, alone: bool) -> None:
        """Raises sqlite3.DatabaseError when the file is not a catalog this program can use."""
        have = self._number("PRAGMA user_version")
        if have > len(STEPS):
            raise NewerError(f"the catalog has schema {have}, newer than {len(STEPS)}")
        sync, cache = "OFF" if alone else "FULL", OWN_CACHE if self.path is None else CACHE
        settings = (f"journal_mode = {journal}", f"synchronous = {sync}", f"cache_size = {cache}")
        for setting in settings:
            self.db.execute(f"PRAGMA {setting}").fetchall()
        if have < len(STEPS):
            with self.transaction():
                migrate(self.db, self._number("PRAGMA user_version"))

    def _number(self, query: str) -> int:
        return int(self.db.execute(query).fetchone()[0])

    def is_current(self) -> bool:
        """Whether it has taken all steps of this program."""
        return self._number("PRAGMA user_version") >= len(STEPS)

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """IMMEDIATE, so that two writers queue and do not collide."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self.db.conn.in_transaction:
                self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Questions inside are answered as of one moment, whatever others write."""
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.execute("COMMIT")

    def place(self) -> Place:
        """The point of the log up to which the catalog has come."""
        row = self.db.execute("SELECT log_offset, start, seq, digest FROM place").fetchone()
        return Place(*row)

    def apply(self, record: Record, place: Place, read: ReadBlob) -> None:
        tables = Tables(self.db, read)
        apply(tables, record)
        tables.finish()
        self._move(place)

    def _move(self, place: Place) -> None:
        self.db.execute(
            "UPDATE place SET log_offset = ?, start = ?, seq = ?, digest = ?",
            [place.offset, place.start, place.seq, place.digest],
        )

    def catch_up(self, log: Log, read: ReadBlob, end: int | None = None) -> None:
        """Apply what is missing of the log, or of its first `end` bytes. Call it inside a
        transaction. When a record cannot be applied, those before it have been."""
        done = self.place()
        if end is not None and done.offset >= end:
            return
        tables = Tables(self.db, read) if done.offset else Gathered(self.db, read)
        try:
            for record, place in log.read(done):
                apply(tables, record)
                tables.settle()
                done = place
                if end is not None and done.offset >= end:
                    break
        finally:
            tables.finish()
            self._move(done)

    def reindex(self, id: str, read: ReadBlob) -> None:
        tables = Tables(self.db, read)
        index_manifest(tables, id)
        tables.finish()

    def stamp(self, digest: str) -> Stamp | None:
        row = self.row("SELECT size, mtime_ns, inode FROM stamps WHERE digest = ?", [digest])
        return None if row is None else Stamp(**row)

    def set_stamp(self, digest: str, stamp: Stamp) -> None:
        self.db.execute(
            "INSERT OR REPLACE INTO stamps (digest, size, mtime_ns, inode) VALUES (?, ?, ?, ?)",
            [digest, stamp.size, stamp.mtime_ns, stamp.inode],
        )

    def rows(self, query: str, values: Sequence[object] = ()) -> list[dict[str, Any]]:
        return list(self.db.query(query, list(values)))

    def row(self, query: str, values: Sequence[object] = ()) -> dict[str, Any] | None:
        return next(iter(self.rows(query, values)), None)
