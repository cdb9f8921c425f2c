"""What a push or a pull is going to do; `--dry-run` prints it."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.registry.records import Attachment, Yank
from adapterkit.registry.refs import Ref


@dataclass(frozen=True)
class Piece:
    """A blob to be moved. name: the path of a file, `manifest`, `sketch` or `KIND/NAME`."""

    name: str
    digest: str
    size: int


@dataclass(frozen=True)
class Plan:
    """ref: NAME@VERSION on the side that receives. missing: what that side lacks.

    tags: to be set there. kept_tags: which it has on another version, and keeps there. published:
    whether it has the version already. yank: what is to be said of it there. former: names that are
    to lead to it there.
    """

    ref: Ref
    id: str
    remote: str
    missing: tuple[Piece, ...]
    attachments: tuple[Attachment, ...]
    tags: tuple[str, ...]
    kept_tags: tuple[str, ...]
    published: bool
    yank: Yank | None
    former: tuple[str, ...]

    @property
    def parts(self) -> tuple[Plan, ...]:
        """Of a recipe, what goes first."""
        return ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All that is missing, of parts too; each blob once."""
        found = {piece.digest: piece for part in self.parts for piece in part.missing}
        return tuple((found | {piece.digest: piece for piece in self.missing}).values())

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        left = self.pieces or self.attachments or self.tags or self.yank or self.former
        return self.published and not left


@dataclass(frozen=True)
class PushPlan(Plan):
    parts: tuple[PushPlan, ...] = ()


@dataclass(frozen=True)
class PullPlan(Plan):
    """source: NAME@VERSION there. kept_name: one that leads to it there, but is in use here."""

    source: Ref
    manifest: bytes
    kept_name: str = ""
    parts: tuple[PullPlan, ...] = ()
