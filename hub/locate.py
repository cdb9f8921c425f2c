"""Where an adapter lies: a folder, or a version of the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Union

from adapterkit.hub.sources import FileSource, Folder, open_folder
from adapterkit.hub.sums import check_sums
from adapterkit.registry.errors import InvalidError
from adapterkit.registry.refs import PathSource, Ref, parse_source

if TYPE_CHECKING:
    from adapterkit.registry import Registry

Source = str | Path | Folder
Opener = Union["Registry", Callable[[], "Registry"]]


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
        folder = open_folder(found.path)
        check_sums(folder)
        return folder
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
        return Folder(str(exact), files, manifest=manifest, sketch=sketch)


@contextmanager
def opened(registry: Opener | None) -> Iterator[Registry]:
    """The registry given, left open; or the user's own, closed afterwards."""
    if registry is not None:
        yield registry() if callable(registry) else registry
        return
    from adapterkit.registry import Registry

    with Registry() as own:
        yield own
