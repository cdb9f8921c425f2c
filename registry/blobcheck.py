"""Every file under `blobs/` read and compared with its name."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from adapterkit.registry import problems
from adapterkit.registry.blobs import Blobs, Progress, Stamp
from adapterkit.registry.hashing import CHUNK
from adapterkit.registry.problems import Problem

_PAIR, _HEX = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{64}")
AGAIN = "adapter verify --repair-from REMOTE, or pull or add the same again"


@dataclass
class Need:
    """What the log says of a blob. size: None where it says none. by: whose it is."""

    size: int | None = None
    by: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """A blob as it is. digest: of its bytes; error: why they could not be read."""

    name: str
    size: int = 0
    digest: str = ""
    error: str = ""

    @property
    def good(self) -> bool:
        return self.digest == self.name


@dataclass
class Found:
    """seen: by name. strange: files that are no blob. closed: what could not be looked into."""

    seen: dict[str, Seen] = field(default_factory=dict)
    strange: list[Path] = field(default_factory=list)
    closed: dict[Path, OSError] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        return sum(each.size for each in self.seen.values())


def look(blobs: Blobs, wanted: Iterable[str] | None, progress: Progress) -> Found:
    """Read the blobs `wanted`, or all there are. progress: called in several threads."""
    found = Found()
    if wanted is None:
        names = _walk(blobs, found)
    else:
        names = [digest for digest in wanted if _there(blobs, digest)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for seen in pool.map(partial(_see, blobs, progress), names):
            found.seen[seen.name] = seen
    return found


def stored(blobs: Blobs) -> dict[str, Stamp]:
    """Every blob there is, by its name, unread. Raises OSError."""
    found = Found()
    stamps = {name: blobs.stamp(name) for name in _walk(blobs, found)}
    for error in found.closed.values():
        raise error
    return {name: stamp for name, stamp in stamps.items() if stamp is not None}


def _there(blobs: Blobs, digest: str) -> bool:
    return os.path.lexists(blobs.path(digest))


def _walk(blobs: Blobs, found: Found) -> list[str]:
    names = []
    for folder in _children(blobs, blobs.root.parent, found):
        if folder != blobs.root:
            found.strange += _files(blobs, folder, found)
    for folder in _children(blobs, blobs.root, found):
        for path in _files(blobs, folder, found):
            good = path.parent == folder and _PAIR.fullmatch(folder.name)
            if good and _HEX.fullmatch(path.name) and path.name.startswith(folder.name):
                names.append(path.name)
            else:
                found.strange.append(path)
    return names


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
    except OSError as error:
        return Seen(name, size, error=f"cannot be read: {error.strerror or error}")
    return Seen(name, size, hasher.hexdigest())


def judge(blobs: Blobs, found: Found, needs: Mapping[str, Need]) -> list[Problem]:
    """What is wrong with blobs."""

    def shown(digest: str) -> str:
        return blobs.path(digest).relative_to(blobs.root.parent.parent).as_posix()

    faults = [
        problem
        for name, seen in found.seen.items()
        if (problem := _wrong(seen, needs.get(name), shown(name)))
    ]
    for path, error in found.closed.items():
        where = path.relative_to(blobs.root.parent.parent).as_posix()
        detail, repair = f"cannot be read: {error.strerror or error}", "make it readable"
        faults.append(Problem(problems.UNREADABLE, where, detail, (), repair))
    for digest in sorted(set(needs) - set(found.seen)):
        affects = tuple(needs[digest].by)
        faults.append(Problem(problems.MISSING, shown(digest), "is not there", affects, AGAIN))
    return faults


def _wrong(seen: Seen, need: Need | None, where: str) -> Problem | None:
    affects = tuple(need.by) if need else ()
    repair = AGAIN if need else "adapter gc removes it"
    if seen.error:
        return Problem(problems.UNREADABLE, where, seen.error, affects, repair)
    if not seen.good:
        short = need is not None and need.size is not None and seen.size < need.size
        detail = f"holds {seen.size} bytes of digest {seen.digest[:12]}"
        if need is not None and need.size is not None:
            detail += f", expected {need.size} bytes"
        what = problems.TRUNCATED if short else problems.CHANGED
        return Problem(what, where, detail, affects, repair)
    if need is None:
        return Problem(problems.ORPHAN, where, "nothing refers to it", (), repair)
    if need.size is not None and need.size != seen.size:
        detail = f"has {seen.size} bytes, of which the manifest says {need.size}"
        return Problem(problems.MALFORMED, where, detail, affects, "remove that version")
    return None
