"""What a remote can do, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

from adapterkit.registry.errors import InvalidError, NotFoundError
from adapterkit.registry.records import Attachment, Yank
from adapterkit.registry.refs import LATEST, Ref
from adapterkit.registry.versions import is_release, shortest, sort_key

# Told how many bytes were moved; less than none when a blob has to start anew.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Published:
    """A version of a remote. name: with its namespace. id: digest of its manifest."""

    name: str
    version: str
    id: str

    @property
    def ref(self) -> Ref:
        return Ref.parse(self.name).at(self.version)


class Remote(Protocol):
    """Blobs by digest, versions by name. Digests are 64 hex digits.

    What it says is a stranger's word: `sync` checks all of it. An answer that is malformed is a
    DamagedError, a remote that cannot be reached a RemoteError.
    """

    @property
    def url(self) -> str: ...

    def exists(self) -> bool:
        """False where the first push will make it."""
        ...

    def has(self, digest: str, size: int) -> bool:
        """Whether the blob need not be sent."""
        ...

    def send(self, digest: str, size: int, source: Path, progress: Progress) -> None:
        """Store a blob; goes on where an earlier call was interrupted."""
        ...

    def fetch(self, digest: str, start: int) -> BinaryIO:
        """The bytes of a blob from `start` on. Raises DamagedError when it is not there."""
        ...

    def names(self) -> Sequence[str]:
        """With their namespaces, sorted."""
        ...

    def versions(self, name: str) -> Sequence[Published]:
        """Lowest first; none for an unknown name."""
        ...

    def tags(self, name: str) -> dict[str, Published]: ...

    def attachments(self, id: str) -> Sequence[Attachment]:
        """Of one version, oldest first."""
        ...

    def publish(self, version: Published) -> bool:
        """Make a version visible: called when all its blobs are there. Whether it is new.

        Raises ConflictError when its number has another id: a version never changes.
        """
        ...

    def attach(self, attachment: Attachment) -> None:
        """Once its blob is there."""
        ...

    def tag(self, tag: str, target: Published) -> None: ...

    def yank(self, version: Published) -> Yank | None:
        """What was last said of it, if anything was."""
        ...

    def set_yank(self, version: Published, said: Yank) -> None: ...

    def target(self, name: str) -> str | None:
        """The name that `name` has now, if it was changed."""
        ...

    def redirect(self, name: str, target: str) -> None: ...


def find(remote: Remote, ref: Ref) -> Published:
    """The version that `ref` means there; a bare name is the highest release that was not yanked,
    as it is locally. A name that was changed means the new one, where that has such a version.

    Raises NotFoundError.
    """
    now = remote.target(ref.full_name)
    if now is not None and now != ref.full_name:
        named = Ref.parse(now)
        there = _matching(remote, replace(ref, namespace=named.namespace, name=named.name))
        if there:
            return there[-1]
    found = _matching(remote, ref)
    if not found:
        raise _not_found(remote, ref, remote.versions(ref.full_name))
    return found[-1]


def _matching(remote: Remote, ref: Ref) -> list[Published]:
    """The one that is meant is the last."""
    have = remote.versions(ref.full_name)
    if ref.version is not None:
        return [v for v in have if shortest(v.version) == shortest(ref.version)]
    if ref.digest is not None:
        found = [v for v in have if v.id.startswith(ref.digest)]
        if len({v.id for v in found}) > 1:
            raise InvalidError(f"{ref} means several versions", hint="give more digits")
        return found
    if ref.tag is not None and ref.tag != LATEST:
        tagged = remote.tags(ref.full_name).get(ref.tag)
        return [] if tagged is None else [tagged]
    return [v for v in sorted(have, key=_rank) if not _is_yanked(remote, v)]


def _rank(version: Published) -> tuple[bool, str]:
    return is_release(version.version), sort_key(version.version)


def _is_yanked(remote: Remote, version: Published) -> bool:
    said = remote.yank(version)
    return said is not None and said.yanked


def _not_found(remote: Remote, ref: Ref, have: Sequence[Published]) -> NotFoundError:
    some = ", ".join(v.version for v in have[-8:])
    names = ", ".join(Ref.parse(name).short_name for name in remote.names()[:8])
    hint = f"it has {some}" if have else f"it has {names}" if names else "it is empty"
    return NotFoundError(f"{ref} is not in {remote.url}", hint=hint)
