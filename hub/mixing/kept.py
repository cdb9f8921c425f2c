"""A weighted sum kept as it is: a recipe of its parts, where no single adapter carries it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.hub.locate import locate
from adapterkit.hub.made import Made, MemorySource, Origin
from adapterkit.hub.mixing.inputs import Weighted, pairs
from adapterkit.hub.recipe_versions import add_recipe
from adapterkit.hub.recipes import FILE, Recipe
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import ConflictError

if TYPE_CHECKING:
    from adapterkit.registry import Registry
    from adapterkit.registry.records import Added


def as_recipe(sources: Weighted, registry: Registry | None = None) -> Recipe:
    """Versions -> weights, as a recipe. Raises InvalidError for what is no version of a registry,
    ConflictError for one that is named twice."""
    from adapterkit.hub.compose.saving import recipe_of

    weights: dict[str, float] = {}
    folders: dict[str, Folder] = {}
    for source, weight in pairs(sources):
        folder = locate(source, registry)
        if folder.name in folders:
            raise ConflictError(f"{folder.name} is listed twice", hint="give it one weight")
        weights[folder.name], folders[folder.name] = float(weight), folder
    return recipe_of(weights, folders, None, "exact")


def store(
    recipe: Recipe, registry: Registry, name: str, version: str | None = None,
    tags: Sequence[str] = (),
) -> Added:  # fmt: skip
    """As a version of `name`."""
    folder = Folder(name, {FILE: MemorySource(FILE, recipe.dump())})
    return add_recipe(registry, folder, name, version=version, tags=tags, attachments={})


def made_of(recipe: Recipe) -> Made:
    """The recipe as a folder that can be saved."""
    names = " + ".join(f"{part.weight:g} {part.label}" for part in recipe.parts)
    return Made(names, {FILE: recipe.dump()}, Origin(recipe.record()))
