"""The catalog: SQLite tables made from the log, to answer quickly. It can always be deleted."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.registry.apply import apply
from adapterkit.registry.blobs import Stamp
from adapterkit.registry.indexing import ReadBlob, index_manifest, put
from adapterkit.registry.log import Log, Place, Record
from adapterkit.registry.migrations import STEPS, migrate

if TYPE_CHECKING:
    from sqlite_utils import Database

BUSY_SECONDS = 60
# In KiB, used when needed: ids lie everywhere, so that making a large catalog touches all pages.
CACHE = -256 * 1024


class Catalog:
    """path: the database file, or None for one in memory. shared: whether other processes may
    have it open; where memory cannot be shared with them, they must not."""

    def __init__(self, path: Path | None, shared: bool = True) -> None:
        from sqlite_utils import Database

        self.path = path
        connection = sqlite3.connect(
            path or ":memory:",
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self.db: Database = Database(connection, execute_plugins=False)
            self.db.execute("PRAGMA busy_timeout = 60000")
            self._open("WAL" if shared else "DELETE")
        except BaseException:
            connection.close()
            raise

    def _open(self, journal: str) -> None:
        """Raises sqlite3.DatabaseError when the file is not a catalog this program can use."""
        have = self._number("PRAGMA user_version")
        if have > len(STEPS):
            raise sqlite3.DatabaseError(f"the catalog has schema {have}, newer than {len(STEPS)}")
        settings = (f"journal_mode = {journal}", "synchronous = FULL", f"cache_size = {CACHE}")
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
        apply(self.db, record, read)
        self.db.execute(
            "UPDATE place SET log_offset = ?, start = ?, seq = ?, digest = ?",
            [place.offset, place.start, place.seq, place.digest],
        )

    def catch_up(self, log: Log, read: ReadBlob) -> None:
        """Apply what is missing of the log. Call it inside a transaction."""
        for record, place in log.read(self.place()):
            self.apply(record, place, read)

    def reindex(self, id: str, read: ReadBlob) -> None:
        index_manifest(self.db, id, read)

    def stamp(self, digest: str) -> Stamp | None:
        row = self.row("SELECT size, mtime_ns, inode FROM stamps WHERE digest = ?", [digest])
        return None if row is None else Stamp(**row)

    def set_stamp(self, digest: str, stamp: Stamp) -> None:
        row = {"digest": digest, "size": stamp.size}
        put(self.db, "stamps", row | {"mtime_ns": stamp.mtime_ns, "inode": stamp.inode})

    def rows(self, query: str, values: Sequence[object] = ()) -> list[dict[str, Any]]:
        return list(self.db.query(query, list(values)))

    def row(self, query: str, values: Sequence[object] = ()) -> dict[str, Any] | None:
        return next(iter(self.rows(query, values)), None)


def delete(path: Path) -> None:
    """Remove the database with its side files: the log makes a new one."""
    for suffix in ("-wal", "-shm", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
