"""A registry of an older format brought to the one of this program, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from adapterkit.registry import layout
from adapterkit.registry.errors import DamagedError, NotFoundError
from adapterkit.registry.files import Files, storage_errors, write_new

# What a step may change; blobs never change, and the catalog is made anew.
_KEPT = ("FORMAT", "log", "remotes.json")

Step = Callable[[Path, Files], None]
# The number of a format -> what makes the next one of it. A step can be repeated after a crash.
STEPS: Mapping[int, Step] = {}


def upgrade(home: Path, files: Files | None = None) -> tuple[int, int]:
    """The number of the format before, and now.

    What a step can change is copied to `before-<number>/` in the folder first. Raises
    NotFoundError when there is no registry, AdapterError when it is newer than this program.
    """
    files = files or Files()
    with storage_errors(f"the registry {home} cannot be upgraded"):
        before = layout.number(home, files)
        if before is None:
            raise NotFoundError(f"there is no registry in {home}")
        if before == layout.FORMAT:
            return before, before
        with FileLock(home / "lock"):
            # Looked at again: another process may have done it meanwhile.
            for number in range(layout.number(home, files) or before, layout.FORMAT):
                if number not in STEPS:
                    raise DamagedError(f"the registry {home} has format {number}, which never was")
                _keep(home, files, number)
                STEPS[number](home, files)
                line = f"adapterkit-{layout.STORE} {number + 1}\n"
                write_new(files, home / "FORMAT", line.encode(), home / "tmp")
    return before, layout.FORMAT


def _keep(home: Path, files: Files, number: int) -> None:
    """A copy that is there already was made before a crash, and is the good one."""
    folder = home / f"before-{number}"
    files.make_folder(folder)
    for name in _KEPT:
        if (home / name).exists() and not (folder / name).exists():
            with files.open(home / name) as source:
                write_new(files, folder / name, source.read(), home / "tmp")
