"""What is said of a version or a name, and travels with it: yanks, and names that were changed."""

from __future__ import annotations

from adapterkit.hub.remotes.base import Published, Remote
from adapterkit.registry.errors import NotFoundError
from adapterkit.registry.records import Version, Yank
from adapterkit.registry.refs import Ref
from adapterkit.registry.registry import Registry


def to_push(
    registry: Registry, version: Version, remote: Remote, there: Published | None
) -> tuple[Yank | None, tuple[str, ...]]:
    """What to say of it in the remote, and the names that should lead to it there."""
    said = registry.yank_of(version.ref)
    before = None if there is None else remote.yank(there)
    former = registry.former_names(version.name)
    known = remote.exists()
    new = [name for name in former if not known or remote.target(name) != version.name]
    return said if said is not None and said.newer(before) else None, tuple(new)


def to_pull(
    registry: Registry, here: Version | None, remote: Remote, source: Published
) -> Yank | None:
    said = remote.yank(source)
    before = None if here is None else registry.yank_of(here.ref)
    return said if said is not None and said.newer(before) else None


def former_name(
    registry: Registry, wanted: Ref, source: Published
) -> tuple[tuple[str, ...], str]:
    """The name that was asked for, if it leads to another one there: to do the same here, or, where
    something here has it, to leave it."""
    name = wanted.full_name
    if name == source.name or name in registry.former_names(source.name):
        return (), ""
    try:
        registry.history(name)
    except NotFoundError:
        return (name,), ""
    return (), name
