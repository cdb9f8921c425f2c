"""Damaged blobs made whole again, from what else there is of them. A good one is never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from adapterkit.registry import problems
from adapterkit.registry.blobcheck import Need
from adapterkit.registry.blobs import Blobs, Progress
from adapterkit.registry.errors import AdapterError
from adapterkit.registry.files import Files, storage_errors
from adapterkit.registry.hashing import compare
from adapterkit.registry.home import Home
from adapterkit.registry.locking import Locking
from adapterkit.registry.problems import Health
from adapterkit.registry.strictjson import MAX_SIZE, digest_of
from adapterkit.registry.trash import Trash
from adapterkit.registry.verify import Examined, examine

TRASH, ASTRAY, CATALOG = "the trash", "a file under a wrong name", "the catalog"


class Source(Protocol):
    """Where a blob may be had, such as a remote; what it gives is hashed before it is believed."""

    @property
    def url(self) -> str: ...

    def fetch(self, digest: str, start: int) -> BinaryIO:
        """Raises AdapterError when it is not there."""
        ...


@dataclass(frozen=True)
class Mend:
    """A blob that was damaged. source: where good bytes came from, '' while it still is damaged;
    then reasons: why, of every source that was asked."""

    digest: str
    affects: tuple[str, ...]
    source: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Repaired:
    """health: of the registry afterwards."""

    health: Health
    mends: tuple[Mend, ...]


def repair(
    home: Path,
    sources: Sequence[Source],
    files: Files | None = None,
    progress: Progress = lambda size: None,
    *,
    rebuild: bool = False,
    single_writer: bool = False,
) -> Repaired:
    """Replace every needed blob that is not what it should be, then the catalog if it is damaged.

    Nothing but blobs is believed of `sources`, and of the catalog only manifests that have their
    digest. rebuild: make the catalog anew even so. Once a lost manifest is back, it is known what
    else its version needs: so all is looked at again until nothing new is found.
    """
    home, files = home.absolute(), files or Files()
    mends: dict[str, Mend] = {}
    moved: set[Path] = set()
    rebuilt = False
    while True:
        found = examine(home, files, progress)
        lost = {digest: need for digest, need in found.lost.items() if digest not in mends}
        astray = {d: path for d, path in found.astray.items() if path not in moved}
        stale = not rebuilt and (rebuild or _has(found.health, problems.CATALOG))
        # Where the log is damaged, the catalog knows more than could be made of it, and stays.
        rebuilt = stale and not _has(found.health, problems.LOG, problems.FORMAT)
        if not (lost or astray or rebuilt):
            return Repaired(found.health, tuple(mends[digest] for digest in sorted(mends)))
        Locking(home, files, single_writer).check()
        if lost or astray:
            work, rebuilt = _Work(home, files, sources, progress), False
            mends |= {digest: work.mend(digest, need, found) for digest, need in lost.items()}
            work.tidy(astray)
            moved |= set(astray.values())
        else:
            _rebuild(home, files, single_writer)


def _has(health: Health, *words: str) -> bool:
    return any(problem.what in words for problem in health.damage)


class _Work:
    def __init__(
        self, home: Path, files: Files, sources: Sequence[Source], progress: Progress
    ) -> None:
        self.files, self.sources, self.progress = files, sources, progress
        self.blobs = Blobs(home / "blobs", home / "tmp", files)
        self.trash = Trash(home / "trash", self.blobs, files)
        with storage_errors(f"the registry {home} cannot be repaired"):
            self.blobs.create()

    def mend(self, digest: str, need: Need, found: Examined) -> Mend:
        """From whoever has it first; what is near, first."""
        reasons = []
        for name, bring in self._ways(digest, need, found):
            try:
                with storage_errors(f"blob {digest[:12]} cannot be brought back"):
                    bring()
                if self.blobs.intact(digest):
                    return Mend(digest, need.by, name)
            except AdapterError as error:
                text = str(error)
                reasons.append(text if name in text else f"{name}: {text}")
        return Mend(digest, need.by, "", tuple(reasons))

    def _ways(
        self, digest: str, need: Need, found: Examined
    ) -> Iterator[tuple[str, Callable[[], object]]]:
        yield TRASH, lambda: self.trash.revive(digest)
        if digest in found.astray:
            yield ASTRAY, lambda: self.blobs.put(found.astray[digest], digest)
        if digest in found.kept:
            yield CATALOG, lambda: self.blobs.put(found.kept[digest], digest)
        for source in self.sources:
            yield source.url, partial(self._receive, source, digest, need.size)

    def _receive(self, source: Source, digest: str, size: int | None) -> None:
        if size is not None:
            fetch = partial(source.fetch, digest)
            self.blobs.receive(digest, size, fetch, self.progress)
            return
        # Of a manifest nobody says how large it is: no more is read than may be one.
        with source.fetch(digest, 0) as file:
            data = file.read(MAX_SIZE + 1)
        compare(digest_of(data), len(data), digest, None)
        self.blobs.put(data, digest)

    def tidy(self, astray: Mapping[str, Path]) -> None:
        """Remove files under a wrong name whose bytes are in their right place by now."""
        for digest, path in astray.items():
            if self.blobs.intact(digest):
                with storage_errors(f"{path} cannot be removed"):
                    self.files.unlink(path)


def _rebuild(home: Path, files: Files, single_writer: bool) -> None:
    opened = Home(home, files, single_writer)
    try:
        opened.rebuild()
    finally:
        opened.close()
