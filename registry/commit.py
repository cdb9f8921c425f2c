"""Preconditions and records of the changes to names, versions and tags."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adapterkit.registry import attaching, queries, wholes
from adapterkit.registry.blobs import Blob
from adapterkit.registry.change import Change
from adapterkit.registry.errors import ConflictError, InvalidError
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.records import Attachment, Version
from adapterkit.registry.refs import LATEST, Ref, check_tag
from adapterkit.registry.versions import following, sort_key


def version(
    change: Change, ref: Ref, id: str, tags: Sequence[str], entries: Sequence[Attachment]
) -> tuple[Ref, bool]:
    """Record that `ref` is `id`; the version, and whether it is a new one.

    A ref without a number is the version that is `id` already, else the next one.
    """
    ref = queries.current_ref(change.catalog, ref)
    number = ref.version or _number(change, ref, id)
    row = queries.recorded(change.catalog, ref.full_name, number)
    if row is not None and row["id"] != id:
        state = "was removed, and was" if row["removed"] else "is"
        raise ConflictError(
            f"{ref.at(number)} {state} {row['id'][:12]}, other content than {id[:12]}",
            hint="a version never changes: leave its number out for the next one",
        )
    for tag in tags:
        check_free(change, ref.full_name, tag, number)
    if row is not None and not row["removed"]:
        _amend(change, queries.resolve(change.catalog, ref.at(number)), tags, entries)
        return ref.at(row["version"]), False
    payload = {"name": ref.full_name, "version": number, "id": id, "tags": list(tags)}
    change.append("version", payload | {"attachments": [attaching.fields(e) for e in entries]})
    return ref.at(number), True


def _number(change: Change, ref: Ref, id: str) -> str:
    same = queries.with_id(change.catalog, ref.full_name, id)
    if same is not None:
        return same.version
    return following(queries.every_number(change.catalog, ref.full_name))


def _amend(
    change: Change, have: Version, tags: Sequence[str], entries: Sequence[Attachment]
) -> None:
    """New tags and attachments of a version that is there; its manifest too, if it was lost."""
    if have.damaged:
        change.catalog.reindex(have.id, change.home.blobs.read)
    for tag in tags:
        move_tag(change, have, tag)
    for entry in entries:
        attaching.append(change, have, entry)


def move_tag(change: Change, target: Version, tag: str) -> Version | None:
    """What the tag pointed at before. Raises ConflictError when it is protected."""
    before = tagged(change, target.name, tag)
    check_free(change, target.name, tag, target.version)
    if before is None or before.version != target.version:
        payload = {"name": target.name, "tag": tag, "version": target.version, "id": target.id}
        change.append("tag", payload | {"previous": before.version if before else None})
    return before


def tagged(change: Change, name: str, tag: str) -> Version | None:
    return next(iter(queries.tagged(change.catalog, name, tag)), None)


def check_free(change: Change, name: str, tag: str, version: str | None = None) -> None:
    """Raises ConflictError when the tag is protected and at another version than `version`."""
    if queries.is_protected(change.catalog, name, tag):
        before = tagged(change, name, tag)
        if version is None or before is None or sort_key(before.version) != sort_key(version):
            shown = f"{Ref.parse(name)}:{tag}"
            raise ConflictError(
                f"the tag {shown} is protected", hint=f"adapter tag {shown} --unprotect"
            )


def remove(change: Change, target: Version) -> None:
    """Raises ConflictError when one of its tags is protected, or a recipe needs it."""
    for tag in target.tags:
        check_free(change, target.name, tag)
    wholes.require_unneeded(change, target)
    payload = {"name": target.name, "version": target.version, "id": target.id}
    change.append("tombstone", payload | {"tags": list(target.tags)})


def movable(tag: str) -> str:
    """A tag that can be set. Raises InvalidError."""
    if tag == LATEST:
        raise InvalidError(
            f"{LATEST!r} is not a tag: it always means the highest release",
            hint="choose another word, such as stable",
        )
    return check_tag(tag)


def only_one(have: Sequence[Version], ref: Ref, target: Version) -> None:
    """Raises InvalidError when `ref`, a bare name or a digest, could mean several versions."""
    meant = [v for v in have if ref.digest is None or v.id == target.id]
    if len(meant) > 1:
        raise InvalidError(
            f"{ref} has {len(meant)} versions: {', '.join(v.version for v in meant[:20])}",
            hint=f"name one: {ref.at(meant[-1].version)}",
        )


def check_complete(manifest: Manifest, put: Iterable[Blob]) -> None:
    """Raises InvalidError when the manifest refers to a blob that was not given."""
    given = {blob.digest: blob.size for blob in put}
    lost = [digest for digest, size in manifest.blobs().items() if given.get(digest) != size]
    if lost:
        raise InvalidError(f"the manifest refers to {lost[0][:12]}, which was not given with it")


def stamp(change: Change, digest: str) -> None:
    found = change.home.blobs.stamp(digest)
    if found is not None:
        change.catalog.set_stamp(digest, found)
