"""Where an adapter lies: a folder, or a version of the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from adapterkit.hub.findings import clean
from adapterkit.hub.recipes import folder_of, is_file
from adapterkit.hub.sources import FileSource, Folder, open_folder, sole_subfolder
from adapterkit.hub.sums import check_sums
from adapterkit.registry.errors import ConflictError, DamagedError, InvalidError
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.refs import PathSource, Ref, parse_source
from adapterkit.registry.strictjson import canonical

if TYPE_CHECKING:
    from adapterkit.registry import Registry

CONFIG = "adapter_config.json"
Source = str | Path | Folder
Opener = Union["Registry", Callable[[], "Registry"]]


def named(adapters: Mapping[str, Source] | Sequence[Source] | Source) -> dict[str, Source]:
    """Names -> sources; a list names each by what it is. Raises InvalidError, ConflictError."""
    if isinstance(adapters, str | Path | Folder):
        adapters = [adapters]
    if not isinstance(adapters, Mapping | Sequence):
        raise InvalidError(f"adapters are {adapters!r}, expected names -> sources, or sources")
    sources = list(adapters.values() if isinstance(adapters, Mapping) else adapters)
    odd = [repr(source) for source in sources if not isinstance(source, str | Path | Folder)]
    if odd:
        raise InvalidError(f"an adapter is a reference or a folder, found {', '.join(odd)}")
    if isinstance(adapters, Mapping):
        return dict(adapters)
    found = {
        source.name if isinstance(source, Folder) else str(source): source for source in sources
    }
    if len(found) < len(sources):
        raise ConflictError("the same adapter is listed twice", hint="give a mapping of names")
    return found


def locate(source: Source, registry: Opener | None = None) -> Folder:
    """The files of an adapter. A string follows the grammar of references: `./dir`, `team/sql@1.2`.

    registry: where references are looked up, or a function that opens it, called for a reference
    only; the user's own when None. Blobs are checked against the registry's stamps.
    Raises NotFoundError, DamagedError, InvalidError.
    """
    if isinstance(source, Folder):
        return source
    found = PathSource(source) if isinstance(source, Path) else parse_source(source)
    if isinstance(found, PathSource):
        return folder(found.path)
    if not isinstance(found, Ref):
        raise InvalidError(
            f"{source} is on a remote, and is not here", hint=f"adapter pull {source}"
        )
    with opened(registry) as store:
        version = store.resolve(found)
        exact = version.ref  # a tag may move in between
        files = {path: FileSource.open(blob, path) for path, blob in store.files(exact).items()}
        manifest = store.manifest(exact)
        recorded = (manifest.base or {}).get("sketch")
        sketch = None
        if recorded:
            blob = store.blob(recorded["digest"].removeprefix("sha256:"))
            sketch = FileSource.open(blob, "the sketch of the base")
        hints = recorded_hints(manifest)
        return Folder(str(exact), files, manifest=manifest, sketch=sketch, hints=hints)


def with_hints(source: Source, hints: Mapping[str, Any]) -> Source:
    """The source, with what its files do not say. Raises InvalidError for one that is stored."""
    if not hints:
        return source
    found = parse_source(source) if isinstance(source, str) else source
    path = found.path if isinstance(found, PathSource) else found
    if not isinstance(path, Path):
        raise InvalidError(
            f"hints are given for {source}, which is no folder: what is stored has its hints"
        )
    return folder(path, **hints)


def folder(path: str | Path, /, **hints: Any) -> Folder:
    """An adapter's folder, and what its files do not say: `folder("./dump", alpha=16)`; or the file
    of a recipe.

    Stands for the folder wherever a source is taken; the registry remembers the hints.
    Raises NotFoundError, DamagedError, and InvalidError for a hint that JSON cannot hold."""
    if is_file(Path(path)):
        return _recipe(Path(path), hints)
    opened = open_folder(Path(path))
    check_sums(opened)
    _require_canonical(hints)
    return replace(sole_subfolder(opened, CONFIG), hints=hints)


def _recipe(path: Path, hints: Mapping[str, Any]) -> Folder:
    if hints:
        raise InvalidError(f"{path} is a recipe, which takes no hints: {', '.join(sorted(hints))}")
    return folder_of(path)


def _require_canonical(hints: Mapping[str, Any]) -> None:
    for name, value in hints.items():
        try:
            canonical(value)
        except (ValueError, TypeError, RecursionError) as error:
            shown = clean(repr(value), 80)
            raise InvalidError(f"the hint {clean(name)} is {shown}, which is no JSON") from error


def recorded_hints(manifest: Manifest) -> Mapping[str, Any]:
    """What the user said of a version that its files do not; raises DamagedError."""
    hints = manifest.adapter.get("hints", {})
    if not isinstance(hints, Mapping):
        raise DamagedError(f"the manifest {manifest.id[:12]} has hints that are no object")
    return hints


@contextmanager
def opened(registry: Opener | None) -> Iterator[Registry]:
    """The registry given, left open; or the user's own, closed afterwards."""
    if registry is not None:
        yield registry() if callable(registry) else registry
        return
    from adapterkit.registry import Registry

    with Registry() as own:
        yield own
