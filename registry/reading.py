"""The questions a registry answers; none of them changes what it holds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from adapterkit.registry import listing, queries, usage
from adapterkit.registry.blobs import bare
from adapterkit.registry.errors import (
    AdapterWarning,
    DamagedError,
    InvalidError,
    NotFoundError,
)
from adapterkit.registry.export import export
from adapterkit.registry.files import Files
from adapterkit.registry.filters import Filter
from adapterkit.registry.home import Home
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.metrics import merged
from adapterkit.registry.moves import moves_of
from adapterkit.registry.records import Attachment, Edge, Event, Lineage, TagMove, Version, Yank
from adapterkit.registry.refs import Ref
from adapterkit.registry.usage import Disk, Usage


def default_home() -> Path:
    """$ADAPTERKIT_HOME, else the place this system keeps users' data in."""
    given = os.environ.get("ADAPTERKIT_HOME")
    if given:
        return Path(given).expanduser()
    from platformdirs import user_data_path

    return user_data_path("adapterkit", appauthor=False)


class ReadingSide:
    """References are given as text or as Ref. home: see default_home; it need not exist yet.

    single_writer: no other process writes there, so that no lock is needed.
    """

    def __init__(
        self, home: Path | None = None, *, files: Files | None = None, single_writer: bool = False
    ) -> None:
        self.home = Home((home or default_home()).absolute(), files or Files(), single_writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.home.close()

    def list(
        self, pattern: str | None = None, wanted: Filter | None = None, sort: str = "name"
    ) -> list[Version]:
        """Versions by name and number. pattern: as in fnmatch, of the name. sort: "name", "added",
        "size", "rank", a metric, or a metric after "-" for the largest first."""
        return self.home.read(lambda catalog: listing.listing(catalog, pattern, wanted, sort))

    def versions(self, name: str) -> Sequence[Version]:
        """Those of one name, lowest first; none when there is no such name."""
        full = bare_name(name).full_name
        return self.home.read(
            lambda catalog: queries.versions(catalog, queries.current(catalog, full))
        )

    def search(self, text: str, limit: int | None = None) -> Sequence[Version]:
        """By words in names, targets, notes, cards and base, best match first; `ques*` is the
        beginning of a word."""
        return self.home.read(lambda catalog: listing.search(catalog, text, limit))

    def metrics_of(self, versions: Iterable[Version]) -> dict[str, dict[str, float]]:
        """id -> metrics of those that have some, from the catalog."""
        ids = [version.id for version in versions]
        return self.home.read(lambda catalog: listing.metrics_of(catalog, ids))

    def usage(self, pattern: str | None = None) -> tuple[Sequence[Usage], Disk]:
        """What each name takes, by name, and what lies on the disk in all."""
        found = self.home.read(lambda catalog: usage.per_name(catalog, pattern))
        return found, usage.on_disk(self.home.blobs)

    def resolve(self, ref: str | Ref) -> Version:
        """A bare name is its highest release that was not yanked. Raises NotFoundError."""
        wanted = as_ref(ref)
        return self.home.read(lambda catalog: queries.resolve(catalog, wanted))

    def manifest(self, ref: str | Ref) -> Manifest:
        found = self.resolve(ref)
        if found.damaged:
            raise DamagedError(f"{found.ref}: {found.damaged}")
        row = self.home.read(
            lambda catalog: catalog.row("SELECT data FROM manifests WHERE id = ?", [found.id])
        )
        manifest = Manifest.parse(row["data"] if row else b"", f"the manifest of {found.ref}")
        if manifest.id != found.id:
            raise DamagedError(f"the catalog holds another manifest for {found.ref}")
        return manifest

    def files(self, ref: str | Ref) -> dict[str, Path]:
        """Path in the version -> its blob, checked. Never write to one. Warns when it was yanked.

        A blob is read only when it does not look as it did when it was last read. Raises
        DamagedError that names every file whose bytes are not those of the version.
        """
        manifest, found = self.manifest(ref), self.resolve(ref)
        _warn_yanked(found)
        bad = [file.path for file in manifest.files if not self.intact(file.digest)]
        if bad:
            raise DamagedError(
                f"{found.ref} is damaged: other bytes than were stored in {', '.join(bad)}",
                hint="pull it again, or add the same files again",
            )
        return {file.path: self.home.blobs.path(file.digest) for file in manifest.files}

    def intact(self, digest: str, size: int | None = None) -> bool:
        """Whether the blob is there with its bytes, `size` of them; read only when its stamp has
        changed."""
        digest, blobs = bare(digest), self.home.blobs
        stamp = blobs.stamp(digest)
        if stamp is None or size not in (None, stamp.size):
            return False
        if self.home.read(lambda catalog: catalog.stamp(digest)) == stamp:
            return True
        if not blobs.intact(digest):
            return False
        self.home.remember(digest, stamp)
        return True

    def attachments(self, ref: str | Ref) -> Sequence[Attachment]:
        """Oldest first."""
        found = self.resolve(ref)
        return self.home.read(lambda catalog: queries.attachments(catalog, found.id))

    def read_attachment(self, attachment: Attachment) -> bytes:
        return self.home.blobs.read(attachment.digest)

    def metrics(self, ref: str | Ref) -> dict[str, float]:
        """All metrics of a version together; a later value replaces an earlier one."""
        found = [a for a in self.attachments(ref) if a.kind == "metrics"]
        return merged(self.read_attachment(each) for each in found)

    def history(self, name: str) -> Sequence[Event]:
        """What happened to a name, oldest first. Raises NotFoundError."""
        ref = bare_name(name)
        found = self.home.read(
            lambda catalog: queries.history(catalog, queries.current(catalog, ref.full_name))
        )
        if not found:
            raise NotFoundError(f"{ref} is not in the registry")
        return found

    def moves(self, name: str, tag: str | None = None) -> Sequence[TagMove]:
        """What happened to the tags of a name, or to one of them, oldest first."""
        return moves_of(self.history(name), tag)

    def yank_of(self, ref: str | Ref) -> Yank | None:
        """What was last said of a version with `yank` or `unyank`, if anything was."""
        found = self.resolve(ref)
        return self.home.read(lambda catalog: queries.yank(catalog, found))

    def former_names(self, name: str) -> Sequence[str]:
        """Names that lead to this one since it was renamed, with their namespaces."""
        full = bare_name(name).full_name
        return self.home.read(lambda catalog: queries.former_names(catalog, full))

    def lineage(self, ref: str | Ref) -> Lineage:
        found = self.resolve(ref)
        return self.home.read(lambda catalog: queries.lineage(catalog, found.id))

    def parents(self, id: str) -> Sequence[Edge]:
        """What a version was made from directly, also one that was removed."""
        return self.home.read(lambda catalog: queries.parents(catalog, bare(id)))

    def held(self, id: str) -> Ref | None:
        """A name under which the version with that id is here, None where it is not."""
        return self.home.read(lambda catalog: queries.any_ref(catalog, bare(id)))

    def export(self, ref: str | Ref, folder: Path) -> Path:
        """Copy the files into `folder`, which must be new or empty, all or nothing."""
        manifest, found = self.manifest(ref), self.resolve(ref)
        _warn_yanked(found)
        return export(self.home, manifest, folder, str(found.ref))

    def missing(self, digests: Iterable[str]) -> Sequence[str]:
        """Those of `digests` that are not stored, or whose stored bytes have rotted."""
        return [digest for digest in digests if not self.intact(digest)]

    def blob(self, digest: str) -> Path:
        """Where a blob lies, checked. Raises NotFoundError, DamagedError."""
        if self.home.blobs.stamp(digest) is None:
            raise NotFoundError(f"there is no blob {bare(digest)[:12]}")
        if not self.intact(digest):
            raise DamagedError(f"blob {bare(digest)[:12]} holds other bytes than its name says")
        return self.home.blobs.path(digest)


def _warn_yanked(version: Version) -> None:
    if version.yanked is not None:
        reason = f": {version.yanked}" if version.yanked else ""
        warnings.warn(f"{version.ref} was yanked{reason}", AdapterWarning, stacklevel=3)


def as_ref(ref: str | Ref) -> Ref:
    return ref if isinstance(ref, Ref) else Ref.parse(ref)


def bare_name(name: str | Ref) -> Ref:
    """A reference that is only a name. Raises InvalidError."""
    ref = as_ref(name)
    if (ref.version, ref.tag, ref.digest) != (None, None, None):
        raise InvalidError(f"{ref} is a reference, expected only a name", hint=ref.short_name)
    return ref
