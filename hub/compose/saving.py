"""What is active on a model, as a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adapterkit.hub.compose.blocks import Block
from adapterkit.hub.compose.groups import record
from adapterkit.hub.findings import clean
from adapterkit.hub.recipes import Part, Recipe
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import ConflictError, InvalidError
from adapterkit.registry.files import storage_errors


def recipe_of(
    weights: Mapping[str, float], folders: Mapping[str, Folder], block: Block | None, dialect: str
) -> Recipe:
    """weights: names that are active, in order. folders: where each came from.

    Raises InvalidError naming those that are no version of a registry: a recipe knows its parts by
    the digests of their versions.
    """
    if not weights:
        raise InvalidError("nothing is active, and a recipe of nothing is none")
    loose = [name for name in weights if folders[name].manifest is None]
    if loose:
        raise InvalidError(
            f"{clean(', '.join(loose))} came from folders, and a recipe is made of versions",
            hint="adapter add FOLDER NAME, and attach NAME",
        )
    parts = []
    for name, weight in weights.items():
        manifest = folders[name].manifest
        if manifest is not None:
            parts.append(Part(manifest.id, folders[name].name, 1.0 if block else weight))
    numbers = {name: i for i, name in enumerate(weights)}
    return Recipe(tuple(parts), dialect, None if block is None else record(block, numbers))


def write(recipe: Recipe, path: Path) -> Path:
    """Into a new file. Raises ConflictError if there is one."""
    data = recipe.dump()
    with storage_errors(f"the recipe cannot be written to {path}"):
        try:
            file = path.open("xb")
        except FileExistsError as error:
            raise ConflictError(f"{path} is there already", hint="name a new file") from error
        with file:
            file.write(data)
    return path
