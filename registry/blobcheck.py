"""Every file under `blobs/` read and compared with its name."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from adapterkit.registry import problems
from adapterkit.registry.blobs import Blobs, Progress
from adapterkit.registry.hashing import CHUNK
from adapterkit.registry.problems import Problem

_PAIR, _HEX = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{64}")
AGAIN = "adapter verify --repair-from REMOTE, or pull or add the same again"


# Files in the hands of the threads that read: enough to keep them busy.
_AT_ONCE = 512


@dataclass(frozen=True)
class Need:
    """What the log says of a blob. size: None where it says none. by: whose it is."""

    size: int | None
    by: tuple[str, ...]


class Needed(Protocol):
    """The same of many: see needs.Needs."""

    @property
    def sizes(self) -> Mapping[str, int | None]: ...
    def by(self, digest: str) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """A blob as it is. digest: of its bytes; error: why they could not be read; gone: collected
    since it was listed."""

    name: str
    size: int = 0
    digest: str = ""
    error: str = ""
    gone: bool = False

    @property
    def good(self) -> bool:
        return self.digest == self.name


@dataclass
class Found:
    """n_blobs, n_bytes: read. lost: names of blobs that are not there with their bytes. strange:
    files that are no blob. closed: what could not be looked into."""

    n_blobs: int = 0
    n_bytes: int = 0
    lost: set[str] = field(default_factory=set)
    strange: list[Path] = field(default_factory=list)
    closed: dict[Path, OSError] = field(default_factory=dict)


def look(blobs: Blobs, names: Sequence[str], progress: Progress) -> Iterator[Seen]:
    """Read blobs, some at a time. progress: called in several threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(names), _AT_ONCE):
            yield from pool.map(partial(_see, blobs, progress), names[start : start + _AT_ONCE])


def stored(blobs: Blobs) -> Iterator[str]:
    """The name of every blob there is. Raises OSError."""
    found = Found()
    yield from walk(blobs, found)
    for error in found.closed.values():
        raise error


def there(blobs: Blobs, digests: Iterable[str]) -> list[str]:
    return [digest for digest in digests if os.path.lexists(blobs.path(digest))]


def walk(blobs: Blobs, found: Found) -> Iterator[str]:
    """The name of every blob; what is none goes into `found`."""
    for folder in _children(blobs, blobs.root.parent, found):
        if folder != blobs.root:
            found.strange += _files(blobs, folder, found)
    for folder in _children(blobs, blobs.root, found):
        for path in _files(blobs, folder, found):
            good = path.parent == folder and _PAIR.fullmatch(folder.name)
            if good and _HEX.fullmatch(path.name) and path.name.startswith(folder.name):
                yield path.name
            else:
                found.strange.append(path)


def _children(blobs: Blobs, folder: Path, found: Found) -> list[Path]:
    try:
        return [folder / name for name in blobs.files.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        found.closed[folder] = error
        return []


def _files(blobs: Blobs, path: Path, found: Found) -> Iterator[Path]:
    """Everything below `path`, or itself, that is no folder; links are not followed."""
    try:
        is_folder = stat.S_ISDIR(blobs.files.lstat(path).st_mode)
    except FileNotFoundError:  # collected just now
        return
    except OSError as error:
        found.closed[path] = error
        return
    if not is_folder:
        yield path
        return
    for child in _children(blobs, path, found):
        yield from _files(blobs, child, found)


def _see(blobs: Blobs, progress: Progress, name: str) -> Seen:
    return see(blobs, blobs.path(name), name, progress)


def see(blobs: Blobs, path: Path, name: str, progress: Progress) -> Seen:
    hasher, size = hashlib.sha256(), 0
    try:
        if not stat.S_ISREG(blobs.files.lstat(path).st_mode):
            return Seen(name, error="is a link or a folder, not a file")
        with blobs.files.open(path) as file:
            while data := file.read(CHUNK):
                hasher.update(data)
                size += len(data)
                progress(len(data))
    except FileNotFoundError:
        return Seen(name, gone=True)
    except OSError as error:
        return Seen(name, size, error=f"cannot be read: {error.strerror or error}")
    return Seen(name, size, hasher.hexdigest())


def judge(blobs: Blobs, needs: Needed, found: Found, seen: Iterable[Seen]) -> Iterator[Problem]:
    """What is wrong with blobs, and which of those that are needed are not among `seen`."""
    missing = set(needs.sizes)
    for each in seen:
        if each.gone:
            continue
        found.n_blobs += 1
        found.n_bytes += each.size
        missing.discard(each.name)
        if not each.good and each.name in needs.sizes:
            found.lost.add(each.name)
        if problem := _wrong(each, needs, _shown(blobs, each.name)):
            yield problem
    for path, error in found.closed.items():
        where = path.relative_to(blobs.root.parent.parent).as_posix()
        detail, repair = f"cannot be read: {error.strerror or error}", "make it readable"
        yield Problem(problems.UNREADABLE, where, detail, (), repair)
    for digest in sorted(missing):
        found.lost.add(digest)
        where = _shown(blobs, digest)
        yield Problem(problems.MISSING, where, "is not there", needs.by(digest), AGAIN)


def _shown(blobs: Blobs, digest: str) -> str:
    return blobs.path(digest).relative_to(blobs.root.parent.parent).as_posix()


def _wrong(seen: Seen, needs: Needed, where: str) -> Problem | None:
    needed, size = seen.name in needs.sizes, needs.sizes.get(seen.name)
    if seen.good and needed and size in (None, seen.size):
        return None
    affects = needs.by(seen.name) if needed else ()
    repair = AGAIN if needed else "adapter gc removes it"
    if seen.error:
        return Problem(problems.UNREADABLE, where, seen.error, affects, repair)
    if not seen.good:
        detail = f"holds {seen.size} bytes of digest {seen.digest[:12]}"
        if size is not None:
            detail += f", expected {size} bytes"
        short = size is not None and seen.size < size
        what = problems.TRUNCATED if short else problems.CHANGED
        return Problem(what, where, detail, affects, repair)
    if not needed:
        return Problem(problems.ORPHAN, where, "nothing refers to it", (), repair)
    detail = f"has {seen.size} bytes, of which the manifest says {size}"
    return Problem(problems.MALFORMED, where, detail, affects, "remove that version")
