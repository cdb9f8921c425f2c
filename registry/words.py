"""What a manifest is found by: a row of the table `search`, made from the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from adapterkit.registry.errors import DamagedError

if TYPE_CHECKING:
    from sqlite_utils import Database

# A longer card is searched by nobody, and need not be held twice.
MAX_CARD = 1 << 18
_SOURCES = (
    "SELECT m.rowid, m.kind, m.variant, m.targets, m.base, (SELECT group_concat(name, ' ') FROM"
    " (SELECT DISTINCT v.name FROM versions v WHERE v.id = m.id ORDER BY v.name)), (SELECT"
    " group_concat(digest, ' ') FROM (SELECT a.digest FROM attachments a WHERE a.subject = m.id"
    " AND a.kind = 'note' ORDER BY a.seq, a.name)), (SELECT f.digest FROM files f WHERE"
    f" f.id = m.id AND f.role = 'card' AND f.size <= {MAX_CARD} ORDER BY f.path LIMIT 1)"
    " FROM manifests m"
)
_INSERT = "INSERT INTO search (rowid, names, targets, notes, base, card) VALUES (?, ?, ?, ?, ?, ?)"


def index(db: Database, read: Callable[[str], bytes], id: str) -> None:
    forget(db, id)
    for row in db.execute(f"{_SOURCES} WHERE m.id = ?", [id]).fetchall():
        db.execute(_INSERT, _words(row, read))


def forget(db: Database, id: str) -> None:
    db.execute("DELETE FROM search WHERE rowid = (SELECT rowid FROM manifests WHERE id = ?)", [id])


def index_all(db: Database, read: Callable[[str], bytes]) -> None:
    """Where nothing is indexed yet."""
    db.conn.executemany(_INSERT, _every(db, read))


def _every(db: Database, read: Callable[[str], bytes]) -> Iterator[Sequence[object]]:
    found = db.execute(f"{_SOURCES} ORDER BY m.rowid")
    while rows := found.fetchmany(1000):
        for row in rows:
            yield _words(row, read)


def _words(row: tuple[Any, ...], read: Callable[[str], bytes]) -> Sequence[object]:
    rowid, kind, variant, targets, base, names, notes, card = row
    texts = [_text(digest, read) for digest in (notes or "").split()]
    about = " ".join((kind, variant, *json.loads(targets)))
    return rowid, names or "", about, " ".join(texts), base, _text(card, read) if card else ""


def _text(digest: str, read: Callable[[str], bytes]) -> str:
    """Nothing where it is lost, which whoever reads it reports."""
    try:
        return read(digest).decode(errors="replace")
    except DamagedError:
        return ""
