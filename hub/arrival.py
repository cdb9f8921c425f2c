"""An adapter from a remote is read again, and must be what its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adapterkit.hub import recipe_versions
from adapterkit.hub.describe import summarize
from adapterkit.hub.findings import clean
from adapterkit.hub.locate import recorded_hints
from adapterkit.hub.read import read_adapter
from adapterkit.hub.recipes import is_recipe
from adapterkit.hub.sources import FileSource, Folder
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.manifest import Manifest


def recheck(manifest: Manifest, files: Mapping[str, Path]) -> None:
    """files: path in the version -> where its bytes are. Raises DamagedError that lists every
    field of the manifest that its files contradict. Fields of a later version are not judged."""
    sources = {path: FileSource.open(blob, path) for path, blob in files.items()}
    hints = recorded_hints(manifest)
    folder = Folder(f"sha256:{manifest.id[:12]}", sources, manifest=manifest, hints=hints)
    if is_recipe(folder):
        recipe_versions.recheck(folder, manifest)
        return
    adapter = read_adapter(folder, manifest.adapter.get("unknown_fields") or ())
    adapter.require_sound()
    derived = summarize(adapter, digest=True).record()
    wrong = [
        f"{name} is {clean(repr(claimed), 80)}, its files say {clean(repr(derived[name]), 80)}"
        for name, claimed in manifest.adapter.items()
        if name in derived and derived[name] != claimed
    ]
    if wrong:
        faults = "; ".join(wrong)
        raise DamagedError(f"the manifest {manifest.id[:12]} contradicts its files: {faults}")
