"""An adapter that was made of others: its files in memory, where it came from, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter, AdapterInfo
from adapterkit.hub.bases.base import Base, Quantization
from adapterkit.hub.describe import summarize
from adapterkit.hub.findings import clean
from adapterkit.hub.formats.files import CONFIG
from adapterkit.hub.papers import sha256_of
from adapterkit.hub.read import read_adapter
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.manifest import Meaning

if TYPE_CHECKING:
    from adapterkit.registry import Registry
    from adapterkit.registry.records import Added


@dataclass(frozen=True)
class MemorySource:
    """Bytes that are in no file."""

    name: str
    data: bytes = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, size: int) -> bytes:
        found = self.data[start : start + size]
        if len(found) < size:
            raise DamagedError(f"{clean(self.name)} ends before {start + size} bytes")
        return found


@dataclass(frozen=True)
class Origin:
    """parents: (id of a version, relation). recipe: how it was made; base, quantization: as in the
    manifest of what it was made of. extra: further blobs these refer to."""

    recipe: Mapping[str, Any]
    parents: tuple[tuple[str, str], ...] = ()
    base: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    extra: Sequence[bytes] = ()


@dataclass(frozen=True)
class Made:
    """files: path -> content. It can be attached, described and checked by its `folder`."""

    name: str
    files: Mapping[str, bytes] = field(repr=False)
    origin: Origin

    @property
    def folder(self) -> Folder:
        sources = {path: MemorySource(path, data) for path, data in self.files.items()}
        return Folder(self.name, sources)

    @cached_property
    def adapter(self) -> Adapter:
        """Read back, and sound: what nobody can read is not handed out."""
        allowed = self.origin.recipe.get("allowed_fields", ())
        found = read_adapter(self.folder, allowed)
        found.require_sound()
        return found

    @cached_property
    def info(self) -> AdapterInfo:
        return summarize(self.adapter, digest=True)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """How it was made: inputs by digest, parameters, version of the tool."""
        return self.origin.recipe

    def papers(self) -> Mapping[str, bytes]:
        """What else is written into a folder."""
        return {}

    @property
    def parents(self) -> tuple[dict[str, str], ...]:
        """As a manifest has them."""
        pairs = self.origin.parents
        return tuple({"version": f"sha256:{id}", "relation": word} for id, word in pairs)

    def save(self, folder: str | Path) -> Path:
        """Write the files into a folder that is new or empty, all or nothing."""
        from adapterkit.registry.export import deliver
        from adapterkit.registry.files import Files

        def fill(part: Path) -> None:
            for path, data in {**self.files, **self.papers()}.items():
                (part / path).write_bytes(data)

        return deliver(Files(), Path(folder), self.name, fill)

    def add(
        self,
        registry: Registry,
        name: str,
        *,
        version: str | None = None,
        tags: Sequence[str] = (),
    ) -> Added:
        """Store it as a version of `name`, with its parents and its recipe."""
        made = self.origin
        base = made.base or {"id": self.adapter.base_name, "revision": self.adapter.revision}
        meaning = Meaning(
            self.info.record(),
            base,
            made.quantization,
            self.parents,
            made.recipe,
            made.extra,
        )
        roles = {path: "config" if path == CONFIG else "weights" for path in self.files}
        return registry.add(name, self.files, meaning, version=version, tags=tags, roles=roles)


def tool() -> dict[str, str]:
    return {"name": "adapterkit", "version": version("adapterkit")}


def input_of(folder: Folder, adapter: Adapter) -> dict[str, Any]:
    """What a recipe says of an input: the id of a version, or the digests of its files."""
    if folder.manifest is not None:
        return {"version": f"sha256:{folder.manifest.id}"}
    names = sorted(adapter.files or folder.files)
    return {"files": {path: f"sha256:{sha256_of(folder.file(path))}" for path in names}}


def origin_of(
    folder: Folder, base: Base | None, touched: Sequence[str], recipe: Mapping[str, Any],
    relation: str,
) -> Origin:  # fmt: skip
    """Of something made of one version or folder: it keeps what is known of its base."""
    manifest = folder.manifest
    parents = () if manifest is None else ((manifest.id, relation),)
    quantization = None if manifest is None else manifest.quantization
    if base is not None:
        from adapterkit.hub.bases.fingerprint import fingerprint

        found = fingerprint(base, touched=touched)
        extra = [found.sketch_data] if found.sketch_data else []
        return Origin(recipe, parents, found.record(), quantization, extra)
    if manifest is None:
        return Origin(recipe)
    extra = [] if folder.sketch is None else [folder.sketch.read(0, folder.sketch.size)]
    return Origin(recipe, parents, manifest.base, quantization, extra)


def planned(quantization: str | None) -> Mapping[str, Any] | None:
    return None if quantization is None else Quantization(quantization).record()
