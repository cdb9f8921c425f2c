"""What the registry answers with: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.registry.refs import Ref


@dataclass(frozen=True)
class Facts:
    """What a manifest says that is worth listing or searching by; empty where it does not."""

    kind: str = ""
    rank: int | None = None
    targets: tuple[str, ...] = ()
    format: str = ""
    base: str = ""
    revision: str = ""
    quantization: str = ""


@dataclass(frozen=True)
class Version:
    """One version. name: with its namespace. id: digest of the manifest, 64 hex digits.

    size: bytes of its files. damaged: why its manifest could not be read, if it could not.
    yanked: the reason ('' where none was given) if it should not be used any more.
    """

    name: str
    version: str
    id: str
    created: str
    author: str
    tags: tuple[str, ...]
    size: int
    n_files: int
    facts: Facts
    damaged: str = ""
    yanked: str | None = None

    @property
    def ref(self) -> Ref:
        return Ref.parse(self.name).at(self.version)


@dataclass(frozen=True)
class Yank:
    """What was last said of a version. since: when that was first said, here or elsewhere."""

    yanked: bool
    reason: str
    since: str

    def newer(self, other: Yank | None) -> bool:
        """Whether this is to be said where `other` (None: nothing) was."""
        if other is None:
            return self.yanked
        mine, other_s = (self.yanked, self.reason), (other.yanked, other.reason)
        return mine != other_s and self.since > other.since


@dataclass(frozen=True)
class Added:
    """ref: NAME@VERSION. created: whether that version is new. new_bytes: stored for it."""

    ref: Ref
    id: str
    created: bool
    size: int
    new_bytes: int


@dataclass(frozen=True)
class Attachment:
    """A blob that says something about version `subject` without being part of it."""

    subject: str
    kind: str
    name: str
    digest: str
    size: int
    created: str = ""
    author: str = ""


@dataclass(frozen=True)
class Event:
    """A record of the log about one name. kind: as in docs/store.md; rename stands with the
    new name, and so does everything that happened before it."""

    seq: int
    kind: str
    time: str
    author: str
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class TagMove:
    """What record `seq` did to a tag. before, after: version numbers, None for nothing.

    undoes: the seq of the move it took back.
    """

    seq: int
    time: str
    author: str
    tag: str
    before: str | None
    after: str | None
    undoes: int | None = None


@dataclass(frozen=True)
class Edge:
    """Version `child` was made from `parent` (both ids). child_ref, parent_ref: under which name
    this registry holds them, None when it does not."""

    child: str
    parent: str
    relation: str
    child_ref: Ref | None = None
    parent_ref: Ref | None = None


@dataclass(frozen=True)
class Lineage:
    """Everything `id` was made from, and everything made from it, at any distance."""

    id: str
    ancestors: tuple[Edge, ...]
    descendants: tuple[Edge, ...]
