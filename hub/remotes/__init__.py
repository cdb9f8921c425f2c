"""Remotes: other stores, by URL. A scheme is one row here and one file beside this one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.registry.errors import InvalidError, NotFoundError
from adapterkit.registry.refs import parse_remote
from adapterkit.registry.urls import parse_url

if TYPE_CHECKING:
    from adapterkit.hub.remotes.base import Remote
    from adapterkit.registry.registry import Registry

REMOTES = {"file": "adapterkit.hub.remotes.folder:FolderRemote"}


def connect(place: str, registry: Registry | Path | None = None) -> Remote:
    """The remote of a URL, or of an alias of `registry` (or of the one in that folder, which is not
    opened); a #NAME behind it does not matter.

    Nothing is opened yet. Raises NotFoundError for an unknown alias or scheme.
    """
    source = parse_remote(place)
    url = parse_url(_url_of(source.remote, registry) if source.is_alias else source.remote)
    check_scheme(url.scheme)
    module, _, attribute = REMOTES[url.scheme].partition(":")
    made: Remote = getattr(import_module(module), attribute)(url)
    return made


def _url_of(alias: str, registry: Registry | Path | None) -> str:
    from adapterkit.hub.remotes import aliases

    if registry is None:
        raise InvalidError(f"{alias} is not a URL", hint="write a URL, such as file:///folder")
    home = registry if isinstance(registry, Path) else registry.home.path
    return aliases.url_of(home, alias)


def check_scheme(scheme: str) -> None:
    """Raises NotFoundError for one that no row speaks."""
    if scheme not in REMOTES:
        raise NotFoundError(
            f"no remote speaks {scheme}://", hint=f"known: {', '.join(f'{s}://' for s in REMOTES)}"
        )
