"""One write of the registry."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.registry.clock import author, now
from adapterkit.registry.errors import ConflictError
from adapterkit.registry.log import Place, Record, make_record

if TYPE_CHECKING:
    from adapterkit.registry.home import Home


class Change:
    """One write: preconditions are checked in `catalog`, then `append` commits."""

    def __init__(self, home: Home) -> None:
        self.home, self.catalog = home, home.catalog
        self.place: Place = home.catalog.place()
        self.committed = False
        self.stale: sqlite3.Error | None = None

    def append(self, kind: str, payload: Mapping[str, Any]) -> Record:
        """The record is durable on return: the change has happened, whatever comes after."""
        record = make_record(self.place, kind, payload, now(), author())
        self.place = self.home.log.append(record, self.place)
        self.committed = True
        try:
            self.catalog.apply(record, self.place, self.home.blobs.read)
        except sqlite3.Error as error:
            self.stale = error
        return record

    def require(self, digests: Iterable[str]) -> None:
        """That blobs are there, before a record speaks of them: gc, which works under the same
        lock, may have taken one away since."""
        blobs, trash = self.home.blobs, self.home.trash
        for digest in digests:
            if blobs.stamp(digest) is None and not trash.revive(digest):
                raise ConflictError(
                    f"blob {digest[:12]} was taken away before it was recorded", hint="try again"
                )
