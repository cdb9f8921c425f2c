"""The catalog on disk compared with one made afresh from the log and the blobs."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from adapterkit.registry.catalog import BUSY_SECONDS, Catalog
from adapterkit.registry.problems import CATALOG, Problem

# ValueError: text, also that of SQLite's own messages, that is no UTF-8 any more.
UNREADABLE = (sqlite3.Error, ValueError, TypeError)
# What SQLite says where it cannot make them.
_NO_SIDES = ("SQLITE_CANTOPEN", "SQLITE_READONLY")
REBUILD = "adapter verify --rebuild"
# Whose rows stay as they were when a blob of a removed version is gone.
_LIVE = "IN (SELECT id FROM versions WHERE removed IS NULL)"
_FROM_BLOBS = {
    "search": f"SELECT m.id, s.* FROM search s LEFT JOIN manifests m ON m.rowid = s.rowid"
    f" WHERE m.id IS NULL OR m.id {_LIVE}",
    "metrics": f"SELECT * FROM metrics WHERE subject {_LIVE}",
}


def copy_of(path: Path) -> Catalog:
    """A copy in memory: nothing done to it, and nobody who writes, disturbs the other.

    Raises one of UNREADABLE when it cannot be read, FileNotFoundError when there is none.
    """
    while True:
        inode, copy = path.stat().st_ino, Catalog(None)
        try:
            _copy(path, copy)
        except UNREADABLE:
            copy.close()
            if path.stat().st_ino == inode:
                raise
            continue  # it was replaced meanwhile, and its journal is the one of the new catalog
        except BaseException:
            copy.close()
            raise
        if path.stat().st_ino == inode:
            return copy
        copy.close()


def _copy(path: Path, copy: Catalog) -> None:
    source = _open(path)
    try:
        source.backup(copy.db.conn)
    finally:
        source.close()


def _open(path: Path) -> sqlite3.Connection:
    # Where the folder cannot be written, the side files of WAL can only be done without.
    for options in ("mode=ro", "mode=ro&immutable=1"):
        uri = f"file:{quote(os.fsencode(path))}?{options}"
        source = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)
        try:
            source.execute("SELECT 1 FROM sqlite_master").fetchone()
            return source
        except UNREADABLE as error:
            source.close()
            if not getattr(error, "sqlite_errorname", "").startswith(_NO_SIDES):
                raise
    raise sqlite3.OperationalError(f"{path.name} cannot be opened")


def sound(disk: Catalog) -> list[Problem]:
    """What SQLite itself finds."""
    faults = [row[0] for row in disk.db.execute("PRAGMA integrity_check(20)").fetchall()]
    faults = [text for text in faults if text != "ok"]
    if not faults:
        try:
            disk.db.execute("INSERT INTO search (search, rank) VALUES ('integrity-check', 1)")
        except UNREADABLE as error:
            faults.append(f"the index of words does not fit its text ({error})")
    return [damaged(text) for text in faults]


def damaged(detail: str, table: str = "", affects: tuple[str, ...] = ()) -> Problem:
    where = f"catalog.db, table {table}" if table else "catalog.db"
    return Problem(CATALOG, where, detail, affects, REBUILD)


def differences(disk: Catalog, fresh: Catalog, all_readable: bool) -> list[Problem]:
    """Both stand at the same place of the log.

    all_readable: whether every blob that the rows are made from could be read.
    """
    if _schema(disk) != _schema(fresh):
        return [damaged("its tables are not those of this program")]
    tables = [t for t in _tables(fresh) if all_readable or t not in _FROM_BLOBS]
    found = []
    for table in tables:
        one, two = _marks(disk, table), _marks(fresh, table)
        if other := one ^ two:
            detail = f"{len(other)} rows differ from what the log and the blobs say"
            found.append(damaged(detail, table, _affected(other, table, disk, fresh)))
    return found


def _schema(catalog: Catalog) -> object:
    rows = _raw(catalog, "SELECT type, name, tbl_name, sql FROM sqlite_master")
    return sorted(map(repr, rows)), list(_raw(catalog, "PRAGMA user_version"))


def _tables(catalog: Catalog) -> list[str]:
    """Without those that FTS keeps for itself, and without stamps, which no log holds."""
    query = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
    names = [row["name"] for row in catalog.rows(query)]
    return [n for n in names if not n.startswith(("sqlite_", "search_")) and n != "stamps"]


def _marks(catalog: Catalog, table: str) -> set[bytes]:
    """One per row: of many rows, little is held."""
    return {mark for mark, _ in _rows(catalog, table)}


def _rows(catalog: Catalog, table: str) -> Iterator[tuple[bytes, str]]:
    """Rows as text with types, so that 1, '1' and a blob of it are three; each behind its mark."""
    for row in _raw(catalog, _FROM_BLOBS.get(table, f"SELECT * FROM {table}")):
        text = repr(row)
        yield blake2b(text.encode(), digest_size=16).digest(), text


def _raw(catalog: Catalog, query: str) -> Iterator[tuple[object, ...]]:
    connection = catalog.db.conn
    usual: Callable[[bytes], object] = connection.text_factory
    connection.text_factory = bytearray  # no UTF-8 any more is a difference, not an error
    try:
        yield from connection.execute(query)
    finally:
        connection.text_factory = usual


def _affected(marks: set[bytes], table: str, *catalogs: Catalog) -> tuple[str, ...]:
    """The names that are spoken of in some of the rows that differ, as far as they can be told."""
    found = (text for c in catalogs for mark, text in _rows(c, table) if mark in marks)
    some = list(islice(found, 50))
    rows = catalogs[-1].rows("SELECT DISTINCT name FROM versions ORDER BY name LIMIT 1000")
    names = [row["name"] for row in rows]
    return tuple(name for name in names if any(repr(name.encode())[1:] in row for row in some))
