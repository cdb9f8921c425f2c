"""A recipe as a version of the registry: its manifest follows from its file and its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import AdapterInfo
from adapterkit.hub.findings import clean
from adapterkit.hub.recipes import FILE, KIND, SCHEMA, Recipe, read_recipe
from adapterkit.hub.sources import Folder
from adapterkit.hub.unfold import Leaf, unfold
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.manifest import Manifest, Meaning
from adapterkit.registry.wholes import PART

if TYPE_CHECKING:
    from adapterkit.registry import Registry
    from adapterkit.registry.records import Added


def add_recipe(
    registry: Registry,
    folder: Folder,
    name: str,
    *,
    version: str | None,
    tags: Sequence[str],
    attachments: Mapping[str, bytes],
) -> Added:
    """Store it in canonical form, made of versions that are here.

    Raises DamagedError, NotFoundError naming the parts that are not here."""
    recipe = read_recipe(folder)
    leaves = unfold(folder, registry).leaves
    meaning = Meaning(record(recipe), _base(leaves), parents=parents(recipe))
    return registry.add(
        name, {FILE: recipe.dump()}, meaning, version=version, tags=tags, attachments=attachments,
        roles={FILE: "recipe"},
    )  # fmt: skip


def record(recipe: Recipe) -> dict[str, Any]:
    """The `adapter` entry of the manifest."""
    whole = recipe.record()
    return {"kind": KIND, "variant": KIND, "format": whole.pop("schema"), **whole}


def parents(recipe: Recipe) -> tuple[dict[str, str], ...]:
    ids = dict.fromkeys(part.id for part in recipe.parts)
    return tuple({"version": f"sha256:{id}", "relation": PART} for id in ids)


def _base(leaves: Sequence[Leaf]) -> dict[str, Any] | None:
    """What all parts say alike of their base."""
    found = [(leaf.folder.manifest.base or {}) for leaf in leaves if leaf.folder.manifest]
    shared = {name: found[0].get(name) for name in ("id", "revision")} if found else {}
    alike = all(base.get(name) == value for base in found for name, value in shared.items())
    return shared if shared.get("id") and alike else None


def info_of(folder: Folder) -> AdapterInfo:
    """What `describe` tells of a recipe: of its parts, they tell themselves."""
    recipe = read_recipe(folder)
    return AdapterInfo(
        name=folder.name, kind=KIND, variant=KIND, format=SCHEMA, ranks={}, alphas=(),
        targets=tuple(part.label for part in recipe.parts), n_modules=0, n_tensors=0,
        n_parameters=0, size=0, dtypes={}, base=None, revision=None, task=None, writer=None,
        unknown_fields={},
    )  # fmt: skip


def recheck(folder: Folder, manifest: Manifest) -> None:
    """Raises DamagedError if the manifest says anything else than the file."""
    recipe = read_recipe(folder)
    about = f"the manifest {manifest.id[:12]} contradicts its {FILE}"
    if dict(manifest.adapter) != record(recipe):
        shown = clean(repr(dict(manifest.adapter)), 200)
        raise DamagedError(f"{about}: it says {shown}, expected what the file says")
    if tuple(manifest.parents) != parents(recipe):
        raise DamagedError(f"{about}: its parents are not the parts")
