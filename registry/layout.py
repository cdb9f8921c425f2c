"""The folder of a registry: which files lie in it, and the number of their format."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from adapterkit.registry.errors import AdapterError, DamagedError, InvalidError
from adapterkit.registry.files import Files, write_new

FORMAT = 1
# Catalogs that were replaced although they may know more than what replaced them.
LOST = re.compile(r"catalog\.lost(-\d+)?(-wal|-shm)?$")
STORE, REMOTE = "store", "remote"
_OWN = {
    STORE: {
        *("FORMAT", "blobs", "tmp", "log", "lock", "remotes.json", "trash", "leases"),
        *("catalog.db", "catalog.db-shm", "catalog.db-wal"),
    },
    REMOTE: {"FORMAT", "blobs", "tmp", "attachments", "refs"},
}


def check(home: Path, files: Files, kind: str = STORE) -> bool:
    """Whether there is a registry, or the remote. Raises if there is something else, or one of
    another format."""
    found = number(home, files, kind)
    if found is None:
        _check_free(home, files, kind)
        return False
    if found < FORMAT:
        raise AdapterError(
            f"the {kind} {home} has format {found}, older than {FORMAT}", hint="adapter upgrade"
        )
    if kind == STORE and not (home / "log").exists():
        raise DamagedError(
            f"the registry {home} lost its log, which says what it holds",
            hint="restore the file 'log' from a backup",
        )
    return True


def number(home: Path, files: Files, kind: str = STORE) -> int | None:
    """The number of its format, if it has one. Raises if it is newer than this program's."""
    try:
        with files.open(home / "FORMAT") as file:
            text = file.read(100).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = re.fullmatch(r"adapterkit-(\w+) (\d{1,9})\n", text)
    if found is None:
        raise DamagedError(f"{home / 'FORMAT'} holds {text[:40]!r}, not a format's number")
    if found[1] != kind:
        raise InvalidError(f"{home} holds an adapterkit {found[1]}, expected a {kind}")
    if int(found[2]) > FORMAT:
        raise AdapterError(
            f"the {kind} {home} has format {found[2]}, newer than {FORMAT}",
            hint="upgrade adapterkit: pip install -U adapterkit",
        )
    return int(found[2])


def _check_free(home: Path, files: Files, kind: str) -> None:
    if not home.exists():
        return
    if not home.is_dir():
        raise InvalidError(f"the {kind} {home} is a file, expected a folder")
    log = home / "log"
    if kind == STORE and log.exists() and files.stat(log).st_size:
        raise DamagedError(f"the registry {home} has a log, but lost its file FORMAT")
    others = sorted(set(files.listdir(home)) - _OWN[kind])
    if others:
        raise InvalidError(
            f"{home} is not an adapterkit {kind}: it has no FORMAT, but {others[0][:80]!r}",
            hint="name a new or an empty folder",
        )


def create(home: Path, files: Files, kind: str = STORE) -> None:
    """FORMAT comes last: where it is, all the rest is durable."""
    if kind == STORE:
        with suppress(FileExistsError):
            files.create(home / "log").close()
    files.fsync_folder(home)
    write_new(files, home / "FORMAT", line(kind), home / "tmp")


def line(kind: str = STORE) -> bytes:
    """What FORMAT holds."""
    return f"adapterkit-{kind} {FORMAT}\n".encode()


def strange(home: Path, files: Files) -> list[str]:
    """Names in the folder of a registry that no registry makes."""
    names = set(files.listdir(home)) - _OWN[STORE]
    return sorted(n for n in names if not re.fullmatch(r"before-\d+", n) and not LOST.match(n))
