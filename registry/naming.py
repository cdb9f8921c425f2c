"""Changes to what names, tags and versions mean to people; none of them touches a blob."""

from __future__ import annotations

from typing import Literal

from adapterkit.registry import commit, moves, queries
from adapterkit.registry.change import Change
from adapterkit.registry.errors import ConflictError, InvalidError, NotFoundError
from adapterkit.registry.reading import ReadingSide, as_ref, bare_name
from adapterkit.registry.records import TagMove, Version, Yank
from adapterkit.registry.refs import Ref
from adapterkit.registry.versions import sort_key

NOTHING = "none"
MAX_REASON = 2000


class NamingSide(ReadingSide):
    """What is here and how to ask for it, and the changes to that."""

    def tag(
        self, ref: str | Ref, tag: str, *, expected: str | Literal["none"] | None = None
    ) -> Version | None:
        """Point `tag` of that name at that version; what it pointed at before.

        expected: the number it must be at now, "none" where it must not be there. Raises
        ConflictError when it is elsewhere, or protected.
        """
        wanted, name = as_ref(ref), commit.movable(tag)
        expected_key = expected if expected in (None, NOTHING) else sort_key(expected)
        with self.home.write() as change:
            target = queries.resolve(change.catalog, wanted)
            before = commit.tagged(change, target.name, name)
            at = NOTHING if before is None else sort_key(before.version)
            if expected_key not in (None, at):
                shown = "not there" if before is None else f"at {before.version}"
                raise ConflictError(
                    f"{target.ref.short_name}:{name} is {shown}, expected at {expected}"
                )
            return commit.move_tag(change, target, name)

    def untag(self, ref: str | Ref) -> Version:
        """Remove NAME:TAG; the version it pointed at."""
        wanted = as_ref(ref)
        tag = commit.movable(wanted.tag or "")
        with self.home.write() as change:
            target = queries.resolve(change.catalog, wanted)
            commit.check_free(change, target.name, tag)
            _untag(change, target, tag)
            return target

    def undo(self, ref: str | Ref) -> TagMove:
        """Take back the last move of NAME:TAG that was not taken back yet, a removal too.

        Raises NotFoundError when there is none, ConflictError when the version it was at is gone.
        """
        wanted = as_ref(ref)
        tag = commit.movable(wanted.tag or "")
        with self.home.write() as change:
            name = queries.current(change.catalog, wanted.full_name)
            events = queries.history(change.catalog, name)
            move = moves.last(moves.moves_of(events, tag))
            if move is None:
                raise NotFoundError(f"{wanted} has no move that could be taken back")
            commit.check_free(change, name, tag)
            _take_back(change, Ref.parse(name), move)
        return self.moves(name, tag)[-1]

    def protect(self, ref: str | Ref, on: bool = True) -> Version:
        """Let NAME:TAG neither be moved nor removed, nor the version it is at; or end that."""
        wanted = as_ref(ref)
        tag = commit.movable(wanted.tag or "")
        with self.home.write() as change:
            target = queries.resolve(change.catalog, wanted)
            if queries.is_protected(change.catalog, target.name, tag) != on:
                change.append("protect", {"name": target.name, "tag": tag, "protected": on})
            return target

    def yank(self, ref: str | Ref, reason: str = "") -> Version:
        """Say that a version should not be used any more: a bare name no longer means it.

        It stays, and who asks for it by number, tag or digest gets it with a warning.
        """
        if len(reason) > MAX_REASON or not reason.isprintable():
            raise InvalidError(f"the reason is not one line of up to {MAX_REASON} characters")
        return self._set_yanked(ref, reason)

    def unyank(self, ref: str | Ref) -> Version:
        return self._set_yanked(ref, None)

    def repeat_yank(self, ref: str | Ref, said: Yank) -> Version:
        """Say of a version what was said elsewhere, unless something later was said here."""
        with self.home.write() as change:
            target = queries.resolve(change.catalog, as_ref(ref))
            if said.newer(queries.yank(change.catalog, target)):
                _say(change, target, said.yanked, said.reason, since=said.since)
            return queries.resolve(change.catalog, target.ref)

    def _set_yanked(self, ref: str | Ref, reason: str | None) -> Version:
        wanted = as_ref(ref)
        with self.home.write() as change:
            target = _one(change, wanted)
            if target.yanked != reason:
                _say(change, target, reason is not None, reason or "")
            return queries.resolve(change.catalog, target.ref)

    def mv(self, name: str | Ref, new: str | Ref) -> Ref:
        """Give a name with its versions, tags and history another name; the new one.

        The old one leads there from now on. Raises ConflictError when the new one is in use.
        """
        wanted, target = bare_name(name), bare_name(new)
        with self.home.write() as change:
            catalog = change.catalog
            old = queries.current_ref(catalog, wanted)
            if not queries.history(catalog, old.full_name):
                raise NotFoundError(f"{wanted} is not in the registry")
            if old == target:
                return target
            leads = queries.current(catalog, target.full_name)
            if queries.history(catalog, target.full_name) or leads not in (
                target.full_name,
                old.full_name,
            ):
                raise ConflictError(f"the name {target} is in use, or was", hint="choose another")
            change.append("rename", {"name": target.full_name, "previous": old.full_name})
            return target

    def redirect(self, name: str | Ref, target: str | Ref) -> None:
        """Let a name that nothing here ever had lead to one that is here.

        Raises ConflictError when it is in use, or was.
        """
        old, wanted = bare_name(name), bare_name(target)
        with self.home.write() as change:
            catalog = change.catalog
            new = queries.current(catalog, wanted.full_name)
            if not queries.history(catalog, new):
                raise NotFoundError(f"{wanted} is not in the registry")
            leads = queries.current(catalog, old.full_name)
            if leads == new:
                return
            if leads != old.full_name or queries.history(catalog, old.full_name):
                raise ConflictError(f"the name {old} is in use, or was")
            change.append("rename", {"name": new, "previous": old.full_name})

    def rm(self, ref: str | Ref) -> Version:
        """Remove a version, or the tag when `ref` is NAME:TAG; what it was.

        Its number is never used for anything else. The blobs stay until they are collected. Raises
        ConflictError for a part of a recipe.
        """
        wanted = as_ref(ref)
        if wanted.tag is not None:
            return self.untag(wanted)
        with self.home.write() as change:
            target = _one(change, wanted)
            commit.remove(change, target)
            return target


def _say(change: Change, target: Version, yanked: bool, reason: str, **more: str) -> None:
    payload = {"name": target.name, "version": target.version, "id": target.id}
    change.append("yank", payload | {"yanked": yanked, "reason": reason} | more)


def _one(change: Change, wanted: Ref) -> Version:
    """The version that `wanted` names. Raises InvalidError when it could mean several."""
    have = queries.versions(change.catalog, queries.current(change.catalog, wanted.full_name))
    if wanted.version is wanted.tag is wanted.digest is None and len(have) == 1:
        return have[0]
    target = queries.resolve(change.catalog, wanted)
    if wanted.version is None and wanted.tag is None:
        commit.only_one(have, wanted, target)
    return target


def _untag(change: Change, target: Version, tag: str, **more: int) -> None:
    payload = {"name": target.name, "tag": tag, "version": target.version, "id": target.id}
    change.append("untag", payload | more)


def _take_back(change: Change, name: Ref, move: TagMove) -> None:
    now = commit.tagged(change, name.full_name, move.tag)
    if move.before is None:
        if now is not None:
            _untag(change, now, move.tag, undoes=move.seq)
        return
    row = queries.recorded(change.catalog, name.full_name, move.before)
    if row is None or row["removed"]:
        raise ConflictError(
            f"{name.short_name}:{move.tag} was at {move.before} before, which was removed"
        )
    target = queries.resolve(change.catalog, name.at(move.before))
    payload = {"name": target.name, "tag": move.tag, "version": target.version, "id": target.id}
    previous = {"previous": now.version if now else None, "undoes": move.seq}
    change.append("tag", payload | previous)
