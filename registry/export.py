"""A version copied out into a folder."""

from __future__ import annotations

import errno
import uuid
from pathlib import Path

from adapterkit.registry.blobs import copy_hashed
from adapterkit.registry.errors import ConflictError, DamagedError
from adapterkit.registry.files import storage_errors
from adapterkit.registry.home import Home
from adapterkit.registry.manifest import Manifest


def export(home: Home, manifest: Manifest, folder: Path, name: str) -> Path:
    """All or nothing: the files come together in a folder beside it, which is then renamed.

    Every byte is checked on the way. Raises ConflictError unless `folder` is new or empty.
    """
    target = folder.absolute()
    part = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:12]}.part")
    with storage_errors(f"{name} cannot be written to {folder}"):
        _check_free(target)
        home.files.mkdir(part)
        try:
            for file in manifest.files:
                _copy(home, file.digest, part / file.path, f"{name}: {file.path}")
            _rename(home, part, target)
        except BaseException:
            home.files.remove_tree(part)
            raise
    return folder


def _check_free(target: Path) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise ConflictError(f"{target} is a file", hint="name a new folder")
    if any(target.iterdir()):
        raise ConflictError(f"{target} is not empty", hint="name a new or an empty folder")


def _copy(home: Home, digest: str, path: Path, name: str) -> None:
    home.files.mkdir(path.parent)
    source = home.blobs.path(digest)
    if not source.exists():
        raise DamagedError(f"{name} is missing from the registry")
    with home.files.open(source) as blob, home.files.create(path) as copy:
        found, _ = copy_hashed(home.files, blob, copy)
    if found != digest:
        raise DamagedError(f"{name} holds other bytes than were stored, of digest {found[:12]}")


def _rename(home: Home, part: Path, target: Path) -> None:
    try:
        home.files.rename(part, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ConflictError(f"{target} was filled while {part.name} was made") from error
        raise
