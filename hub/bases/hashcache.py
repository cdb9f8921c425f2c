"""What files hashed to, remembered by path, size, time and inode. A cache: deleting it is safe."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapterkit.hub.sources import ByteSource, FileSource
from adapterkit.registry.errors import AdapterWarning

NAME = "hashes.sqlite"
# A file may change again within one tick of the clock that its time is kept in.
SETTLED = 2.0
TABLE = (
    "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL,"
    " whole TEXT, leaves TEXT NOT NULL)"
)


@dataclass(frozen=True)
class Hashes:
    """whole: sha256 of the file, leaves: of its tensors by name; what is known of them."""

    whole: str | None = None
    leaves: Mapping[str, str] = field(default_factory=dict)


class HashCache:
    """Hashes of local files. Safe with several processes; a broken cache file is started anew."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def get(self, source: ByteSource) -> Hashes:
        if not isinstance(source, FileSource) or not self.path.exists():
            return Hashes()
        query = "SELECT whole, leaves FROM files WHERE path = ? AND stamp = ?"
        place = (str(source.path.resolve()), stamp(source))
        with self._open() as db:
            row = db.execute(query, place).fetchone()
        return Hashes(row[0], json.loads(row[1])) if row else Hashes()

    def put(self, source: ByteSource, before: str, found: Hashes) -> None:
        """Remember `found`; `before` is the file's stamp when its reading began."""
        if not isinstance(source, FileSource) or before != stamp(source):
            return
        if time.time() - source.path.stat().st_mtime < SETTLED:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            known = self.get(source)
            leaves = json.dumps({**known.leaves, **found.leaves})
            row = (str(source.path.resolve()), before, found.whole or known.whole, leaves)
            with self._open() as db:
                db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", row)
        except (OSError, sqlite3.OperationalError) as error:
            text = f"{self.path}: {error}, so hashes are not remembered"
            warnings.warn(AdapterWarning(text), stacklevel=2)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(self._connect()) as db, db:
            yield db

    def _connect(self) -> sqlite3.Connection:
        try:
            return self._prepared()
        except sqlite3.OperationalError:
            raise  # locked or not writable: nothing wrong with the file
        except sqlite3.DatabaseError:
            self.path.unlink(missing_ok=True)
            return self._prepared()

    def _prepared(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=60)
        try:
            db.execute(TABLE)
        except sqlite3.Error:
            db.close()
            raise
        return db


def stamp(source: ByteSource) -> str:
    """What changes when a file does; empty for a source that is no local file."""
    if not isinstance(source, FileSource):
        return ""
    status = source.path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
