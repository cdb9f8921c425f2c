"""Rows on their way into a catalog: at once, or gathered for one that is made anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from adapterkit.registry import words

if TYPE_CHECKING:
    from sqlite_utils import Database

ReadBlob = Callable[[str], bytes]
# Rows gathered before they are written: enough to make it cheap, few enough to be held.
GATHERED = 5_000
# A rename asks for it in the middle of all.
_KEPT = ("events_name",)


class Tables:
    """Changes take place when they are made. read: the bytes of a blob; raises DamagedError."""

    def __init__(self, db: Database, read: ReadBlob) -> None:
        self.db, self.read = db, read
        self.reworded: set[str] = set()

    def put(self, table: str, row: Mapping[str, object]) -> None:
        """Insert or replace; sqlite-utils' own insert would commit the transaction (before 4.0)."""
        self.change(table, _insert(table, tuple(row)), tuple(row.values()))

    def change(self, table: str, statement: str, values: Sequence[object]) -> None:
        """One that concerns no other table."""
        self.db.execute(statement, values)

    def rows(self, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        return list(self.db.execute(query, values).fetchall())

    def damage(self, id: str) -> str | None:
        """Of a manifest that is here: why it could not be read, '' where it could."""
        found = self.rows("SELECT damaged FROM manifests WHERE id = ?", [id])
        return str(found[0][0]) if found else None

    def put_manifest(self, row: Mapping[str, object]) -> None:
        # It may get another row number, which the words go by.
        words.forget(self.db, str(row["id"]))
        self.put("manifests", row)

    def reword(self, id: str) -> None:
        """What a manifest is found by has changed."""
        self.reworded.add(id)

    def settle(self) -> None:
        """At the end of a record."""
        for id in self.reworded:
            words.index(self.db, self.read, id)
        self.reworded.clear()

    def finish(self) -> None:
        """At the end of all."""
        self.settle()


class Gathered(Tables):
    """For an empty catalog: rows wait until there are many, indexes and words until the end."""

    def __init__(self, db: Database, read: ReadBlob) -> None:
        super().__init__(db, read)
        self.waiting: dict[str, list[tuple[str, Sequence[object]]]] = {}
        self.n_waiting = 0
        self.damages: dict[str, str] = {}
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql != ''"
        found = self.rows(query, [])
        self.indexes = {name: sql for name, sql in found if name not in _KEPT}
        for name in self.indexes:
            db.execute(f"DROP INDEX {name}")

    def change(self, table: str, statement: str, values: Sequence[object]) -> None:
        self.waiting.setdefault(table, []).append((statement, values))
        self.n_waiting += 1
        if self.n_waiting >= GATHERED:
            self._write()

    def rows(self, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        self._write()
        return super().rows(query, values)

    def damage(self, id: str) -> str | None:
        return self.damages.get(id)

    def put_manifest(self, row: Mapping[str, object]) -> None:
        self.damages[str(row["id"])] = str(row["damaged"])
        self.put("manifests", row)

    def reword(self, id: str) -> None:
        pass

    def finish(self) -> None:
        self._write()
        for sql in self.indexes.values():
            self.db.execute(sql)
        words.index_all(self.db, self.read)

    def _write(self) -> None:
        """In the order of each table; no change concerns two."""
        for changes in self.waiting.values():
            for statement, group in groupby(changes, key=itemgetter(0)):
                self.db.conn.executemany(statement, [values for _, values in group])
        self.waiting.clear()
        self.n_waiting = 0


@lru_cache
def _insert(table: str, columns: tuple[str, ...]) -> str:
    marks = ", ".join("?" * len(columns))
    return f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({marks})"
