"""Short names of remotes, kept in the registry's folder. They hold no credentials: no URL may."""

from __future__ import annotations

from pathlib import Path

from adapterkit.hub.remotes import check_scheme
from adapterkit.registry.errors import ConflictError, DamagedError, NotFoundError
from adapterkit.registry.files import Files, storage_errors, write_new
from adapterkit.registry.refs import check_alias
from adapterkit.registry.registry import Registry
from adapterkit.registry.strictjson import canonical, parse_object
from adapterkit.registry.urls import parse_url

_FILE = "remotes.json"


def add(registry: Registry, alias: str, url: str) -> str:
    """The URL in its normal form. Raises ConflictError when the alias means another one."""
    parsed = parse_url(url)
    check_scheme(parsed.scheme)
    check_alias(alias)
    registry.home.create()
    with registry.home.lock():
        have = _read(registry.home.path, registry.home.files)
        if have.get(alias, str(parsed)) != str(parsed):
            raise ConflictError(
                f"{alias} is {have[alias]} already", hint=f"adapter remote rm {alias}"
            )
        _write(registry, have | {alias: str(parsed)})
    return str(parsed)


def rm(registry: Registry, alias: str) -> str:
    """The URL it meant. Raises NotFoundError."""
    url_of(registry.home.path, alias, registry.home.files)
    with registry.home.lock():
        have = _read(registry.home.path, registry.home.files)
        url = have.pop(alias)
        _write(registry, have)
    return url


def list(registry: Registry) -> dict[str, str]:
    """Alias -> URL, sorted."""
    return dict(sorted(_read(registry.home.path, registry.home.files).items()))


def url_of(home: Path, alias: str, files: Files | None = None) -> str:
    """home: the folder of the registry, which need not be opened for that."""
    have = _read(home, files or Files())
    if alias not in have:
        known = f"known: {', '.join(sorted(have))}" if have else f"adapter remote add {alias} URL"
        raise NotFoundError(f"there is no remote {alias!r}", hint=known)
    return have[alias]


def _read(home: Path, files: Files) -> dict[str, str]:
    path = home / _FILE
    with storage_errors(f"the remotes in {path}"):
        try:
            with files.open(path) as file:
                data = file.read()
        except FileNotFoundError:
            return {}
    value = parse_object(data, str(path))
    found = value.get("remotes")
    if not isinstance(found, dict) or not all(isinstance(url, str) for url in found.values()):
        raise DamagedError(f"{path} is not a table of remotes")
    return found


def _write(registry: Registry, remotes: dict[str, str]) -> None:
    home = registry.home
    with storage_errors(f"the remotes of {home.path}"):
        write_new(home.files, home.path / _FILE, canonical({"remotes": remotes}), home.path / "tmp")
