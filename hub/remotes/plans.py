"""What a push or a pull is going to do; `--dry-run` prints it."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.registry.records import Attachment
from adapterkit.registry.refs import Ref


@dataclass(frozen=True)
class Piece:
    """A blob to be moved. name: the path of a file, `manifest`, `sketch` or `KIND/NAME`."""

    name: str
    digest: str
    size: int


@dataclass(frozen=True)
class PushPlan:
    """ref: NAME@VERSION, the same on both sides. missing: what the remote lacks.

    tags: to be set there. kept_tags: which the remote has on another version, and keeps there.
    published: whether the remote has the version already.
    """

    ref: Ref
    id: str
    remote: str
    missing: tuple[Piece, ...]
    attachments: tuple[Attachment, ...]
    tags: tuple[str, ...]
    kept_tags: tuple[str, ...]
    published: bool

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.missing)


@dataclass(frozen=True)
class PullPlan:
    """source: NAME@VERSION there. ref: the same version here, maybe under another name.

    missing, tags, kept_tags, published: as in PushPlan, the other way round.
    """

    source: Ref
    ref: Ref
    id: str
    remote: str
    manifest: bytes
    missing: tuple[Piece, ...]
    attachments: tuple[Attachment, ...]
    tags: tuple[str, ...]
    kept_tags: tuple[str, ...]
    published: bool

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.missing)
