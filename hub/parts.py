"""What has to go along with a version: the parts of a recipe, those of recipes in it among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from adapterkit.hub.findings import clean
from adapterkit.hub.recipes import MAX_PARTS, is_ref
from adapterkit.hub.remotes.base import Published, Remote
from adapterkit.hub.remotes.plans import PullPlan, PushPlan
from adapterkit.registry.errors import DamagedError, NotFoundError
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.refs import Ref
from adapterkit.registry.registry import Registry
from adapterkit.registry.wholes import parts_of

P = TypeVar("P", PushPlan, PullPlan)


def to_push(
    registry: Registry,
    manifest: Manifest,
    remote: Remote,
    plan: Callable[[Registry, Ref, Remote], PushPlan],
) -> list[PushPlan]:
    """The plans of all parts, each once, those first that others are made of."""
    found: dict[str, PushPlan] = {}
    for id in parts_of(manifest):
        ref = registry.held(id)
        if ref is None:
            raise NotFoundError(f"the part sha256:{id[:12]} is not in the registry")
        _collect(found, plan(registry, ref, remote))
    return list(found.values())


def to_pull(
    registry: Registry,
    manifest: Manifest,
    remote: Remote,
    plan: Callable[[Registry, Remote, Ref], PullPlan],
) -> list[PullPlan]:
    """The plans of the parts that are not here, under the names they have there."""
    ids = parts_of(manifest)
    if len(ids) > MAX_PARTS:
        raise DamagedError(
            f"the manifest {manifest.id[:12]} has {len(ids)} parts, {MAX_PARTS} at most"
        )
    found: dict[str, PullPlan] = {}
    names = _names(manifest)
    for id in ids:
        if registry.held(id) is None and id not in found:
            source = _search(remote, id, names.get(id))
            _collect(found, plan(registry, remote, source.ref))
        if len(found) > MAX_PARTS:
            raise DamagedError(f"{clean(remote.url)} has a recipe of more than {MAX_PARTS} parts")
    return list(found.values())


def _collect(found: dict[str, P], made: P) -> None:
    for each in (*made.parts, made):
        found.setdefault(each.id, replace(each, parts=()))


def _names(manifest: Manifest) -> dict[str, str]:
    """Id of a part -> the name it was known by, as far as the manifest says."""
    rows = manifest.adapter.get("parts")
    rows = rows if isinstance(rows, list) else []
    pairs = [(row.get("version"), row.get("name")) for row in rows if isinstance(row, dict)]
    return {
        version.removeprefix("sha256:"): name
        for version, name in pairs
        if isinstance(version, str) and isinstance(name, str)
    }


def _search(remote: Remote, id: str, known_as: str | None) -> Published:
    """Under the name it was known by, else under any."""
    for name in _candidates(remote, known_as):
        for version in remote.versions(name):
            if version.id == id:
                return version
    raise NotFoundError(
        f"{clean(remote.url)} lacks the part sha256:{id[:12]} of a recipe"
        f"{f' ({clean(known_as)})' if known_as else ''}"
    )


def _candidates(remote: Remote, known_as: str | None) -> Iterator[str]:
    if known_as and is_ref(known_as):
        yield Ref.parse(known_as).full_name
    yield from remote.names()
