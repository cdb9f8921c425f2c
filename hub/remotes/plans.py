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
    published: whether the remote has the version already. parts: of a recipe, what goes first.
    """

    ref: Ref
    id: str
    remote: str
    missing: tuple[Piece, ...]
    attachments: tuple[Attachment, ...]
    tags: tuple[str, ...]
    kept_tags: tuple[str, ...]
    published: bool
    parts: tuple[PushPlan, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All that is missing, of parts too; each blob once."""
        return _every(self)

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class PullPlan:
    """source: NAME@VERSION there. ref: the same version here, maybe under another name.

    missing, tags, kept_tags, published, parts: as in PushPlan, the other way round.
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
    parts: tuple[PullPlan, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return _every(self)

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def _every(plan: PushPlan | PullPlan) -> tuple[Piece, ...]:
    found = {piece.digest: piece for part in plan.parts for piece in part.missing}
    return tuple((found | {piece.digest: piece for piece in plan.missing}).values())
