"""Adapters that are the same on a model with a head and on its body alone, whose names differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base, Module


def rooted(adapter: Adapter, base: Base) -> Adapter:
    """The adapter with its modules called as on this base: with the name of the body in front, or
    without it. As it is where neither fits; what is wrong with it is `fit`'s to say."""
    own = {path for path, role in adapter.tensors if path and not role.startswith("replace.")}
    if not adapter.portable or not own:
        return adapter
    tops = {name.partition(".")[0] for name in base.modules}
    if {path.partition(".")[0] for path in own} <= tops:
        return adapter
    body = _body(own, base.modules)
    if body is not None:
        renamed = {path: f"{body}.{path}" for path in own}
    else:
        renamed = {path: path.partition(".")[2] for path in own}
        if not {path.partition(".")[0] for path in renamed.values()} <= tops:
            return adapter
    tensors = {
        (renamed.get(path, path) if not role.startswith("replace.") else path, role): stored
        for (path, role), stored in adapter.tensors.items()
    }
    return replace(adapter, tensors=tensors)


def _body(paths: set[str], modules: Mapping[str, Module]) -> str | None:
    """The module of the base in which all paths lie, if there is one."""
    inside: dict[str, set[str]] = {}
    for name in modules:
        top, _, rest = name.partition(".")
        inside.setdefault(top, set()).add(rest.partition(".")[0])
    starts = {path.partition(".")[0] for path in paths}
    return next((top for top, names in inside.items() if starts <= names), None)
