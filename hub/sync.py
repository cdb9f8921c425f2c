"""Push and pull: a plan first, then the same plan carried out. The record comes last.

What a remote says is not believed: ids, digests, sizes and paths are checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from adapterkit.hub import parts
from adapterkit.hub.findings import clean
from adapterkit.hub.remotes import marks
from adapterkit.hub.remotes.base import Progress, Published, Remote, find
from adapterkit.hub.remotes.plans import Piece, PullPlan, PushPlan
from adapterkit.registry.attaching import METRICS, NOTE, entry, same
from adapterkit.registry.errors import ConflictError, DamagedError, InvalidError, NotFoundError
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.reading import bare_name
from adapterkit.registry.records import Attachment, Version
from adapterkit.registry.refs import LATEST, Ref
from adapterkit.registry.registry import Registry
from adapterkit.registry.strictjson import MAX_SIZE, digest_of
from adapterkit.registry.versions import shortest

Recheck = Callable[[Manifest, Mapping[str, Path]], None]


def plan_push(
    registry: Registry, ref: str | Ref, remote: Remote, tags: Sequence[str] = ()
) -> PushPlan:
    """tags: to be moved on the remote even if they are elsewhere there, as is the tag of `ref`.

    Raises ConflictError when the remote has other content under that number.
    """
    wanted = ref if isinstance(ref, Ref) else Ref.parse(ref)
    version = registry.resolve(wanted)
    there = _published(remote, version)
    manifest = registry.manifest(version.ref)
    registry.files(version.ref)  # damage stops here, before anything is sent
    attached = registry.attachments(version.ref)
    have = remote.attachments(version.id) if there is not None else []
    new = [a for a in attached if not any(same(a, other) for other in have)]
    named = _named(tags, wanted)
    _must_be_on(version.ref, version.tags, named)
    moved, kept = _split_tags(_tags(remote, version.name), version.version, named, version.tags)
    pieces = _pieces(manifest, version.id, new)
    missing = [piece for piece in pieces if not remote.has(piece.digest, piece.size)]
    yank, former = marks.to_push(registry, version, remote, there)
    return PushPlan(
        version.ref, version.id, remote.url, tuple(missing), tuple(new), moved, kept,
        there is not None, yank, former,
        tuple(parts.to_push(registry, manifest, remote, plan_push)),
    )  # fmt: skip


def push(
    registry: Registry, plan: PushPlan, remote: Remote, progress: Progress | None = None
) -> bool:
    """Carry out a plan; whether the version is new there. progress: told the bytes sent."""
    for part in plan.parts:
        push(registry, part, remote, progress)
    for piece in plan.missing:
        remote.send(piece.digest, piece.size, registry.blob(piece.digest), progress or _silent)
    for attachment in plan.attachments:
        remote.attach(attachment)
    target = Published(plan.ref.full_name, str(plan.ref.version), plan.id)
    created = remote.publish(target)
    if plan.yank is not None:
        remote.set_yank(target, plan.yank)
    for tag in plan.tags:
        remote.tag(tag, target)
    for name in plan.former:
        remote.redirect(name, target.name)
    return created


def plan_pull(
    registry: Registry,
    remote: Remote,
    ref: str | Ref,
    name: str | None = None,
    tags: Sequence[str] = (),
) -> PullPlan:
    """name: under which the version is stored here; its own when left out. tags: as in plan_push.

    Reads the manifest. Raises DamagedError when it is not what the remote says, ConflictError
    when there is other content under that number here.
    """
    wanted = ref if isinstance(ref, Ref) else Ref.parse(ref)
    source = find(remote, wanted)
    target = bare_name(name or source.name).at(source.version)
    here = _recorded(registry, target)
    if here is not None and here.id != source.id:
        raise ConflictError(
            f"{target} is {here.id[:12]} here and {source.id[:12]} in {clean(remote.url)}:"
            " they have diverged",
            hint=f"pull it under another name: adapter pull {remote.url}#{source.ref} NAME",
        )
    data = _fetch_manifest(remote, source)
    manifest = Manifest.parse(data, f"the manifest of {source.ref} in {clean(remote.url)}")
    have = registry.attachments(target) if here is not None else []
    new = [a for a in remote.attachments(source.id) if not any(same(a, other) for other in have)]
    there = [tag for tag, at in remote.tags(source.name).items() if at == source]
    named = _named(tags, wanted)
    _must_be_on(source.ref, there, named)
    local = {tag: v.version for v in registry.versions(target.full_name) for tag in v.tags}
    moved, kept = _split_tags(local, source.version, named, there)
    pieces = [p for p in _pieces(manifest, source.id, new) if p.digest != source.id]
    absent = set(registry.missing(piece.digest for piece in pieces))
    yank = marks.to_pull(registry, here, remote, source)
    former, kept_name = marks.former_name(registry, wanted, source) if name is None else ((), "")
    return PullPlan(
        target, source.id, remote.url,
        tuple(piece for piece in pieces if piece.digest in absent),
        tuple(new), moved, kept, here is not None, yank, former, source.ref, data, kept_name,
        tuple(parts.to_pull(registry, manifest, remote, plan_pull)),
    )  # fmt: skip


def pull(
    registry: Registry,
    plan: PullPlan,
    remote: Remote,
    progress: Progress | None = None,
    recheck: Recheck | None = None,
) -> bool:
    """Carry out a plan; whether the version is new here. progress: told the bytes that arrived.

    recheck: given the manifest and the blob of each file; it raises when what the manifest says
    is not what the files say, and then nothing is recorded. Parts of a recipe come first.
    """
    for part in plan.parts:
        pull(registry, part, remote, progress, recheck)
    for piece in plan.missing:
        registry.receive(
            piece.digest,
            piece.size,
            lambda start, digest=piece.digest: remote.fetch(digest, start),  # type: ignore[misc]
            progress or _silent,
        )
    manifest = Manifest.parse(plan.manifest)
    if recheck is not None:
        recheck(manifest, {f.path: registry.blob(f.digest) for f in manifest.files})
    for attachment in plan.attachments:
        _check_attachment(registry, attachment)
    version = str(plan.ref.version)
    done = registry.publish(plan.ref.full_name, version, plan.manifest, plan.tags, plan.attachments)
    if plan.yank is not None:
        registry.repeat_yank(done.ref, plan.yank)
    for former in plan.former:
        registry.redirect(former, plan.ref.full_name)
    return done.created


def _silent(size: int) -> None:
    pass


def _published(remote: Remote, version: Version) -> Published | None:
    """That version in the remote; None also where the remote is still to be made."""
    if not remote.exists():
        return None
    for there in remote.versions(version.name):
        if shortest(there.version) != shortest(version.version):
            continue
        if there.id != version.id:
            raise ConflictError(
                f"{version.ref} is {version.id[:12]} here and {there.id[:12]} in"
                f" {clean(remote.url)}: they have diverged",
                hint="add it again under another number: a published version never changes",
            )
        return there
    return None


def _recorded(registry: Registry, ref: Ref) -> Version | None:
    try:
        return registry.resolve(ref)
    except NotFoundError:
        return None


def _tags(remote: Remote, name: str) -> dict[str, str]:
    return {tag: at.version for tag, at in remote.tags(name).items()} if remote.exists() else {}


def _named(tags: Sequence[str], ref: Ref) -> list[str]:
    return [*tags, *([ref.tag] if ref.tag and ref.tag != LATEST else [])]


def _must_be_on(ref: Ref, on_it: Iterable[str], named: Sequence[str]) -> None:
    strange = sorted(set(named) - set(on_it))
    if strange:
        raise InvalidError(f"{ref} has no tag {strange[0][:80]!r}")


def _split_tags(
    there: Mapping[str, str], version: str, named: Sequence[str], on_it: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which tags to set on the side that receives, and which it keeps on another version.

    there: the tags of that side, and the version each is on.
    """
    elsewhere = {t for t in on_it if t in there and shortest(there[t]) != shortest(version)}
    kept = elsewhere - set(named)
    moved = {t for t in on_it if t not in there} | (elsewhere - kept)
    return tuple(sorted(moved)), tuple(sorted(kept))


def _pieces(manifest: Manifest, id: str, attachments: Iterable[Attachment]) -> list[Piece]:
    """Every blob once, the manifest behind the files it speaks of."""
    names = {file.digest: file.path for file in manifest.files}
    found = {d: Piece(names.get(d, "sketch"), d, size) for d, size in manifest.blobs().items()}
    for each in attachments:
        name = f"{each.kind}/{each.name}" if each.name else each.kind
        found.setdefault(each.digest, Piece(name, each.digest, each.size))
    found[id] = Piece("manifest", id, len(manifest.dump()))
    return list(found.values())


def _fetch_manifest(remote: Remote, source: Published) -> bytes:
    with remote.fetch(source.id, 0) as file:
        data = file.read(MAX_SIZE + 1)
    if digest_of(data) != source.id:
        raise DamagedError(
            f"the manifest of {source.ref} in {clean(remote.url)} has the digest"
            f" {digest_of(data)[:12]}, expected {source.id[:12]}"
        )
    return data


def _check_attachment(registry: Registry, attachment: Attachment) -> None:
    """Raises DamagedError when its content is not of its kind."""
    if attachment.kind not in (METRICS, NOTE):
        return
    key = f"{attachment.kind}/{attachment.name}" if attachment.name else attachment.kind
    try:
        entry(key, registry.read_attachment(attachment))
    except InvalidError as error:
        raise DamagedError(str(error)) from error
