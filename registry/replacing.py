"""A catalog put in the place of another one."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from adapterkit.registry.files import Files

_SIDES = ("-wal", "-shm", "")


def put(part: Path, path: Path, files: Files) -> None:
    """Call it with the lock held; nobody in this process may have `path` open."""
    with files.open_update(part) as file:
        files.fsync(file)
    if path.exists() and knows_more(path, part):
        set_aside(path)
    else:
        delete(path)
    files.rename(part, path)
    files.fsync_folder(path.parent)


def set_aside(path: Path) -> None:
    """Under a name of its own, `catalog.lost` or one with a number behind it: it may know what is
    lost elsewhere."""
    if path.exists():
        names = ("catalog.lost", *(f"catalog.lost-{n}" for n in range(2, 1000)))
        free = next((n for n in names if not path.with_name(n).exists()), names[-1])
        move(path, path.with_name(free))


def inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def delete(path: Path) -> None:
    """Remove the database with its side files: the log makes a new one."""
    for suffix in _SIDES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
    """Rename the database; what its journal holds belongs to it."""
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    for suffix in ("-wal", ""):
        if (side := path.with_name(path.name + suffix)).exists():
            side.replace(target.with_name(target.name + suffix))


def knows_more(old: Path, new: Path) -> bool:
    """Whether `old` holds a record of the log or a manifest that `new`, made from the log and the
    blobs, does not; or cannot be asked."""
    connection = sqlite3.connect(old, isolation_level=None)
    try:
        connection.execute("ATTACH ? AS new", [os.fsencode(new)])
        events = "SELECT seq, kind, name, created, author, payload FROM {}.events"
        manifests = "SELECT id, data FROM {}.manifests WHERE damaged = ''"
        for query in (events, manifests):
            more = f"{query.format('main')} EXCEPT {query.format('new')} LIMIT 1"
            if connection.execute(more).fetchall():
                return True
        return False
    except (sqlite3.Error, ValueError):
        return True
    finally:
        connection.close()
