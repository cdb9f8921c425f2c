"""A version copied out into a folder."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from adapterkit.registry.errors import ConflictError, DamagedError
from adapterkit.registry.files import Files, storage_errors
from adapterkit.registry.hashing import copy_hashed
from adapterkit.registry.home import Home
from adapterkit.registry.manifest import Manifest


def export(home: Home, manifest: Manifest, folder: Path, name: str) -> Path:
    """As `deliver`, every byte checked on the way."""

    def fill(part: Path) -> None:
        for file in manifest.files:
            _copy(home, file.digest, part / file.path, f"{name}: {file.path}")

    return deliver(home.files, folder, name, fill)


def deliver(files: Files, folder: Path, name: str, fill: Callable[[Path], None]) -> Path:
    """All or nothing: the files come together in a folder of their own, which is renamed at the
    end. fill: makes them in the folder it is given.

    A folder that is there stays the folder it is (it may be somebody's current one): the files are
    moved into it. Raises ConflictError unless it is new or empty.
    """
    target = folder.absolute()
    with storage_errors(f"{name} cannot be written to {folder}"):
        there = _is_there(target)
        part = (target if there else target.parent) / f".{uuid.uuid4().hex}.part"
        try:
            files.mkdir(part)
            fill(part)
            if there:
                _move(files, part, target)
            else:
                files.rename(part, target)
        finally:
            files.remove_tree(part)
    return folder


def _is_there(target: Path) -> bool:
    if not target.exists() and not target.is_symlink():
        return False
    if not target.is_dir():
        raise ConflictError(f"{target} is a file", hint="name a new folder")
    if any(target.iterdir()):
        raise ConflictError(f"{target} is not empty", hint="name a new or an empty folder")
    return True


def _copy(home: Home, digest: str, path: Path, name: str) -> None:
    home.files.mkdir(path.parent)
    source = home.blobs.path(digest)
    if not source.exists():
        raise DamagedError(f"{name} is missing from the registry")
    with home.files.open(source) as blob, home.files.create(path) as copy:
        found, _ = copy_hashed(home.files, blob, copy)
    if found != digest:
        raise DamagedError(f"{name} holds other bytes than were stored, of digest {found[:12]}")


def _move(files: Files, part: Path, target: Path) -> None:
    moved: list[Path] = []
    try:
        for entry in sorted(part.iterdir()):
            if (target / entry.name).exists():
                raise ConflictError(f"{target} was filled in the meantime: it has {entry.name}")
            files.rename(entry, target / entry.name)
            moved.append(target / entry.name)
    except BaseException:
        for path in moved:
            files.remove_tree(path)
            if path.exists():
                files.unlink(path)
        raise
