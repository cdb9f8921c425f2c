"""What a recipe is made of: the adapters themselves, found by their digests, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.hub.findings import clean
from adapterkit.hub.locate import Opener, locate, opened
from adapterkit.hub.recipes import MAX_DEPTH, MAX_PARTS, Part, Recipe, is_recipe, read_recipe
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import InvalidError, NotFoundError

if TYPE_CHECKING:
    from adapterkit.registry import Registry


@dataclass(frozen=True)
class Leaf:
    """One adapter of a recipe. label: by which it is known there. weight: of all recipes it is in
    multiplied."""

    folder: Folder
    label: str
    weight: float


@dataclass(frozen=True)
class Unfolded:
    """leaves: in order. dialect, composition: as in Recipe, the numbers being those of leaves."""

    leaves: tuple[Leaf, ...]
    dialect: str
    composition: Mapping[str, Any] | None


def unfold(folder: Folder, registry: Opener | None = None) -> Unfolded:
    """All adapters of a recipe, those of recipes in it among them.

    Raises NotFoundError naming every part that is not in the registry, DamagedError, and
    InvalidError for recipes that are nested too deeply or cannot be nested.
    """
    recipe = read_recipe(folder)
    with opened(registry) as store:
        leaves = _leaves(folder, recipe, store, 1.0, 0)
    if recipe.composition is not None and len(leaves) != len(recipe.parts):
        raise InvalidError(
            f"{clean(folder.name)} composes a recipe, expected blocks of single adapters"
        )
    return Unfolded(tuple(leaves), recipe.dialect, recipe.composition)


def _leaves(
    folder: Folder, recipe: Recipe, store: Registry, weight: float, depth: int
) -> list[Leaf]:
    if depth > MAX_DEPTH:
        raise InvalidError(f"{clean(folder.name)} nests recipes deeper than {MAX_DEPTH} levels")
    found: list[Leaf] = []
    for part, inside in zip(recipe.parts, parts_of(folder, recipe, store), strict=True):
        if not is_recipe(inside):
            found.append(Leaf(inside, part.label, weight * part.weight))
        else:
            nested = read_recipe(inside)
            _require_like(folder, recipe, inside, nested)
            found += _leaves(inside, nested, store, weight * part.weight, depth + 1)
        if len(found) > MAX_PARTS:
            raise InvalidError(f"{clean(folder.name)} holds more than {MAX_PARTS} adapters in all")
    return found


def parts_of(folder: Folder, recipe: Recipe, store: Registry) -> list[Folder]:
    """The parts as they are in the registry. Raises NotFoundError naming all that are not."""
    refs = [store.held(part.id) for part in recipe.parts]
    absent = [part for part, ref in zip(recipe.parts, refs, strict=True) if ref is None]
    if absent:
        raise missing(folder.name, absent)
    return [locate(str(ref), store) for ref in refs]


def missing(name: str, absent: list[Part]) -> NotFoundError:
    shown = ", ".join(f"{part.label} (sha256:{part.id[:12]})" for part in absent[:20])
    return NotFoundError(
        f"{clean(name)} is made of {clean(shown, 2000)}, not in this registry",
        hint="adapter pull the recipe, which brings its parts, or add them",
    )


def _require_like(folder: Folder, recipe: Recipe, inside: Folder, nested: Recipe) -> None:
    if nested.dialect != recipe.dialect:
        raise InvalidError(
            f"{clean(inside.name)} is a recipe in the dialect {nested.dialect},"
            f" {clean(folder.name)} around it in {recipe.dialect}"
        )
    if nested.composition is not None:
        raise InvalidError(
            f"{clean(inside.name)} composes its parts in blocks, and so is no part of"
            f" {clean(folder.name)}"
        )
