"""A blend made again from its recipe, and held against what was stored."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.hub.bases.base import Base
from adapterkit.hub.findings import clean
from adapterkit.hub.locate import Source, locate
from adapterkit.hub.mixing.blend import blend
from adapterkit.hub.mixing.inputs import Place
from adapterkit.hub.mixing.options import Options
from adapterkit.hub.mixing.written import Blend
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import DamagedError, InvalidError, NotFoundError
from adapterkit.registry.strictjson import digest_of

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.registry import Registry

# Of the change of a module: what other machines and versions of torch may round differently.
CLOSE = 1e-6


@dataclass(frozen=True)
class Rebuilt:
    """same: byte for byte. distance: the largest |change - stored change| / |stored change| of any
    module, and of any other tensor; module: where it is."""

    same: bool
    distance: float
    module: str

    @property
    def close(self) -> bool:
        return self.same or self.distance <= CLOSE


def rebuild(
    ref: str, *, registry: Registry, base: str | Path | Base | None = None,
    executor: Executor | None = None,
) -> Rebuilt:  # fmt: skip
    """Raises InvalidError for what is no blend, NotFoundError naming each input that is not here,
    DamagedError for a recipe that is malformed or for another base than it names."""
    manifest = registry.manifest(ref)
    recipe = manifest.recipe
    if recipe is None or recipe.get("operation") != "blend":
        raise InvalidError(f"{clean(ref)} is no blend: its recipe says nothing of one")
    sources = _sources(ref, recipe, registry)
    _require_base(ref, recipe, base)
    options = _options(ref, recipe)
    made = blend(sources, base=base, registry=registry, executor=executor, options=options)
    stored = {file.path: file.digest for file in manifest.files}
    if stored == {path: digest_of(data) for path, data in made.files.items()}:
        return Rebuilt(True, 0.0, "")
    distance, module = _compare(made, ref, registry)
    return Rebuilt(False, distance, module)


def _sources(
    ref: str, recipe: Mapping[str, Any], registry: Registry
) -> list[tuple[Source, float]]:
    found: list[tuple[Source, float]] = []
    missing = []
    for one in recipe.get("inputs", ()):
        version = one.get("version")
        held = registry.held(version) if isinstance(version, str) else None
        if held is None:
            missing.append(clean(str(version or one.get("files")), 200))
        else:
            found.append((str(held), float(one["weight"])))
    if missing:
        raise NotFoundError(
            f"{clean(ref)} was made of adapters that are not in the registry: {', '.join(missing)}"
        )
    return found


def _options(ref: str, recipe: Mapping[str, Any]) -> Options:
    known = ("method", "rank", "energy", "dtype", "at")
    parameters = dict(recipe.get("parameters", {}))
    own = {name: parameters.pop(name) for name in known if name in parameters}
    base = recipe.get("base") or {}
    try:
        return Options(
            **own,
            quantization=base.get("quantization"),
            allow_fields=tuple(recipe.get("allowed_fields", ())),
            settings=parameters,
        )
    except TypeError as error:
        raise DamagedError(f"the recipe of {clean(ref)} is malformed: {error}") from error


def _require_base(ref: str, recipe: Mapping[str, Any], base: object) -> None:
    if recipe.get("base") and base is None:
        raise InvalidError(f"{clean(ref)} was made with a base", hint="give it: --base BASE")


def _compare(made: Blend, ref: str, registry: Registry) -> tuple[float, str]:
    """(the largest distance, its module)."""
    from adapterkit.hub.tensors import read_finite

    stored = read_adapter(locate(ref, registry), made.recipe.get("allowed_fields", ()))
    ours, theirs = read_finite(made.adapter), read_finite(stored)
    if ours.keys() != theirs.keys():
        return float("inf"), next(iter(ours.keys() ^ theirs.keys()))[0]
    found = [(0.0, "")]
    for module in dict.fromkeys(module for module, _ in ours):
        found.append((_distance(module, ours, theirs), module))
    return max(found)


def _distance(
    module: str, ours: Mapping[Place, Tensor], theirs: Mapping[Place, Tensor]
) -> float:
    """Of the products of factors, which are what counts, and of all other tensors."""
    from adapterkit.hub.blend.factors import Factors, Term, concatenated, norm

    pairs = [("A", "B"), ("embedding_A", "embedding_B")]
    found = 0.0
    for a, b in pairs:
        if (module, a) in ours:
            one = Factors(ours[module, b].double(), ours[module, a].double())
            other = Factors(theirs[module, b].double(), theirs[module, a].double())
            gap = norm(concatenated([Term(1.0, one), Term(-1.0, other)]))
            found = max(found, gap / (norm(other) or 1.0))
    roles = {role for name, role in ours if name == module} - {r for pair in pairs for r in pair}
    for role in roles:
        x, y = ours[module, role].double(), theirs[module, role].double()
        found = max(found, float((x - y).norm() / (y.norm() or 1.0)))
    return found
