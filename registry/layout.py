"""The folder of a registry: which files lie in it, and the number of their format."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from adapterkit.registry.errors import AdapterError, DamagedError, InvalidError
from adapterkit.registry.files import Files, write_new

FORMAT = 1
OWN = {
    "FORMAT",
    "blobs",
    "catalog.db",
    "catalog.db-shm",
    "catalog.db-wal",
    "lock",
    "log",
    "remotes.json",
    "tmp",
}


def check(home: Path, files: Files) -> bool:
    """Whether there is a registry. Raises if there is something else, or a newer one."""
    try:
        with files.open(home / "FORMAT") as file:
            text = file.read(100).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        _check_free(home, files)
        return False
    found = re.fullmatch(r"adapterkit-store (\d{1,9})\n", text)
    if found is None:
        raise DamagedError(f"{home / 'FORMAT'} holds {text[:40]!r}, not a store's number")
    if int(found[1]) > FORMAT:
        raise AdapterError(
            f"the registry {home} has format {found[1]}, newer than {FORMAT}",
            hint="upgrade adapterkit: pip install -U adapterkit",
        )
    if not (home / "log").exists():
        raise DamagedError(
            f"the registry {home} lost its log, which says what it holds",
            hint="restore the file 'log' from a backup",
        )
    return True


def _check_free(home: Path, files: Files) -> None:
    if not home.exists():
        return
    if not home.is_dir():
        raise InvalidError(f"the registry {home} is a file, expected a folder")
    log = home / "log"
    if log.exists() and files.stat(log).st_size:
        raise DamagedError(f"the registry {home} has a log, but lost its file FORMAT")
    others = sorted(set(files.listdir(home)) - OWN)
    if others:
        raise InvalidError(
            f"{home} is not a registry: it has no FORMAT, but {others[0][:80]!r}",
            hint="name a new or an empty folder",
        )


def create(home: Path, files: Files) -> None:
    """FORMAT comes last: where it is, all the rest is durable."""
    with suppress(FileExistsError):
        files.create(home / "log").close()
    files.fsync_folder(home)
    content = f"adapterkit-store {FORMAT}\n".encode()
    write_new(files, home / "FORMAT", content, home / "tmp")
