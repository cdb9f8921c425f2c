"""Where bytes come from: one interface for a file, a blob and a remote range."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from adapterkit.hub.findings import INFO, Finding, clean
from adapterkit.registry.errors import DamagedError, NotFoundError
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.strictjson import check_size, parse_object


class ByteSource(Protocol):
    """Random access to immutable bytes. `name` is what messages call it, `size` is in bytes."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self, start: int, size: int) -> bytes:
        """Exactly `size` bytes from `start`; DamagedError when they are not there."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A local regular file."""

    path: Path
    name: str
    size: int

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> FileSource:
        """Raises NotFoundError if there is nothing, DamagedError if it is not a regular file."""
        shown = clean(name or str(path))
        try:
            status = path.stat()
        except OSError as error:
            raise NotFoundError(f"{shown}: {error.strerror or error}") from error
        if stat.S_ISDIR(status.st_mode):
            raise DamagedError(f"{shown} is a directory, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{shown} is not a file (a device, pipe or socket)")
        return cls(path, name or path.name, status.st_size)

    def _truncated(self, start: int, expected: int, found: int) -> DamagedError:
        return DamagedError(
            f"{clean(self.name)} is truncated: expected {expected} bytes at {start}, found {found}"
        )

    def read_into(self, start: int, view: memoryview) -> None:
        """The same, into memory that is there already."""
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                place = 0
                while place < len(view):
                    count = file.readinto(view[place:])
                    if not count:
                        raise self._truncated(start, len(view), place)
                    place += count
        except OSError as error:
            raise DamagedError(f"{clean(self.name)} cannot be read: {error.strerror}") from error

    def read(self, start: int, size: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                data = os.pread(file.fileno(), size, start)
                while len(data) < size:  # pread stops at 2 GiB
                    more = os.pread(file.fileno(), size - len(data), start + len(data))
                    if not more:
                        raise self._truncated(start, size, len(data))
                    data += more
        except OSError as error:
            raise DamagedError(f"{clean(self.name)} cannot be read: {error.strerror}") from error
        return data


@dataclass(frozen=True)
class Folder:
    """Named files of one adapter or base: a directory, or a version in a registry.

    name: what messages call it. files: relative POSIX path -> source. root: the directory, where
    it is one. manifest, sketch: what the registry recorded of a version and of its base.
    hints: what its files do not say and the user does. remarks: what was odd in finding it.
    """

    name: str
    files: Mapping[str, ByteSource]
    root: Path | None = None
    manifest: Manifest | None = None
    sketch: ByteSource | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[Finding, ...] = ()

    def file(self, path: str) -> ByteSource:
        if path not in self.files:
            raise NotFoundError(f"{clean(self.name)} has no {path}")
        return self.files[path]


def _why_not(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def open_folder(path: Path) -> Folder:
    """The files of a directory and its subdirectories, nothing opened yet.

    Symbolic links are refused (DamagedError, all of them named): an imported folder must not
    reach outside itself. Links of a Hub cache into its own blobs are followed.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # also a loop of links, a name too long, or with a NUL
        raise NotFoundError(f"{clean(str(path))} {_why_not(error)}") from error
    if not stat.S_ISDIR(mode):
        raise DamagedError(
            f"{clean(str(path))} is a file, expected a folder; archives are not opened: their size"
            " is unknown and paths inside them can lead outside",
            hint="unpack it and give the folder",
        )
    files: dict[str, ByteSource] = {}
    links: list[str] = []
    for parent, folders, names in os.walk(path, onerror=_unreadable):
        here = Path(parent)
        linked = [name for name in folders if (here / name).is_symlink()]
        for name in sorted(names + linked):
            place = here / name
            relative = place.relative_to(path).as_posix()
            if place.is_symlink() and not _in_hub_cache(path, place):
                links.append(relative)
            elif name in names:
                files[relative] = FileSource.open(place, relative)
        folders.sort()
    if links:
        shown = ", ".join(f"{link} -> {(path / link).readlink()}" for link in links[:20])
        raise DamagedError(
            f"{clean(str(path))} holds a symbolic link, which may lead outside of the folder:"
            f" {clean(shown, 2000)}",
            hint="copy the file itself into the folder",
        )
    return Folder(str(path), files, path)


def sole_subfolder(folder: Folder, mark: str) -> Folder:
    """The one subfolder with a file called `mark` of a folder that holds nothing else; as PEFT
    saves an adapter that has a name. Any other folder as it is."""
    tops = {path.partition("/")[0] for path in folder.files}
    (top,) = tops if len(tops) == 1 else ("",)
    if f"{top}/{mark}" not in folder.files:
        return folder
    files = {path.removeprefix(f"{top}/"): source for path, source in folder.files.items()}
    about = f"the adapter is in its only subfolder, {top}"
    remark = Finding(INFO, "subfolder", folder.name, f"{mark} at the top", about)
    root = folder.root / top if folder.root is not None else None
    return replace(folder, files=files, root=root, remarks=(*folder.remarks, remark))


def read_object(source: ByteSource, name: str) -> dict[str, Any]:
    """The JSON object in a file; DamagedError if it is none, before anything large is read."""
    check_size(source.size, name)
    return parse_object(source.read(0, source.size), name)


def _unreadable(error: OSError) -> None:
    raise DamagedError(f"{clean(str(error.filename))} cannot be read: {error.strerror}") from error


def _in_hub_cache(folder: Path, link: Path) -> bool:
    """Whether `folder` is a snapshot of huggingface_hub's cache, the link one into its blobs."""
    snapshot = folder.resolve()
    if snapshot.parent.name != "snapshots":
        return False
    try:
        return link.resolve(strict=True).parent == snapshot.parent.parent / "blobs"
    except (OSError, RuntimeError):  # dangling, or a loop
        return False
