"""From a folder to an adapter that knows everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import clean
from adapterkit.hub.formats import read_folder
from adapterkit.hub.kinds import kind
from adapterkit.hub.recipes import is_recipe, read_recipe
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import InvalidError


def read_adapter(folder: Folder, allow_fields: Collection[str] = ()) -> Adapter:
    """The adapter in `folder`; its `findings` hold what is incomplete or odd.

    Raises DamagedError when a file cannot be read at all, NotFoundError when a file is missing or
    the adapter is of a type or format that is not supported, InvalidError for a recipe.
    """
    if is_recipe(folder):
        parts = read_recipe(folder).parts
        raise InvalidError(
            f"{clean(folder.name)} is a recipe of {len(parts)} adapters, expected one adapter",
            hint=f"name one of {', '.join(part.label for part in parts[:8])}",
        )
    adapter = read_folder(folder, allow_fields)
    problems = kind(adapter.kind).problems(adapter)
    return replace(adapter, findings=(*adapter.findings, *problems))
