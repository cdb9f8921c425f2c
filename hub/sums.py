"""A `manifest.json` beside the weights, which lists files and sums: a claim, to be compared."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath, PureWindowsPath

from adapterkit.hub.findings import clean, several
from adapterkit.hub.sources import ByteSource, Folder, read_object
from adapterkit.registry.errors import DamagedError

NAME = "manifest.json"
CHUNK = 1 << 22


def check_sums(folder: Folder) -> None:
    """Raises DamagedError naming every path that leaves the folder and every file whose sha256 or
    size is not the one listed. A folder without such a list, or another manifest, is fine."""
    if NAME not in folder.files:
        return
    rows = read_object(folder.files[NAME], f"{clean(folder.name)}/{NAME}").get("files")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return
    faults = [fault for row in rows for fault in _faults(row, folder)]
    if faults:
        raise DamagedError(f"{clean(folder.name)}/{NAME}: {several(faults)}")


def _faults(row: dict[str, object], folder: Folder) -> list[str]:
    path = row.get("path")
    if not isinstance(path, str) or not is_inside(path):
        return [f"the path {clean(repr(path))} leads outside of the folder"]
    if path not in folder.files:
        return [f"{clean(path)} is listed and missing"]
    source = folder.files[path]
    size, digest = row.get("size"), row.get("sha256")
    if size is not None and size != source.size:
        return [f"{clean(path)} has size {source.size}, listed as {clean(repr(size))}"]
    if digest is not None and str(digest).lower() != _sha256(source):
        return [f"{clean(path)} does not have the sha256 checksum that is listed"]
    return []


def is_inside(path: str) -> bool:
    """Whether a relative path stays inside the folder it is relative to, on any system."""
    windows = PureWindowsPath(path)
    return (
        bool(path)
        and "\0" not in path
        and not PurePosixPath(path).is_absolute()
        and not windows.drive
        and not windows.root
        and ".." not in windows.parts
    )


def _sha256(source: ByteSource) -> str:
    found = hashlib.sha256()
    for start in range(0, source.size, CHUNK):
        found.update(source.read(start, min(CHUNK, source.size - start)))
    return found.hexdigest()
