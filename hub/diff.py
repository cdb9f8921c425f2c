"""What differs between two adapters: config, metrics, and what they do to each module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.describe import summarize
from adapterkit.hub.locate import Source, locate, opened
from adapterkit.hub.norms import Parts, distance, inner, norm, parts_of
from adapterkit.hub.read import read_adapter
from adapterkit.registry.refs import PathSource, parse_source

if TYPE_CHECKING:
    from adapterkit.registry import Registry

WEIGHT, BIAS = "weight", "bias"


@dataclass(frozen=True)
class Change:
    """A field that is not the same; None where one does not have it."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class ModuleDiff:
    """One part of one module: the change of its weight or bias, or what stands for another one.

    a, b: Frobenius norms of the two changes, 0 for one that leaves it alone, None where only the
    base could tell. distance: norm of their difference; None where shapes differ or one side has
    nothing to compare with. cosine: of the angle between them; None where one is zero.
    needs_base: whether what is said here is not all there is.
    """

    module: str
    part: str
    a: float | None
    b: float | None
    distance: float | None
    cosine: float | None = None
    needs_base: bool = False


@dataclass(frozen=True)
class Diff:
    """config: fields of the config and of what the files mean. metrics: of the versions.

    modules: every module that either changes. total: norms over all weights and biases that can be
    computed without the base; needs_base of it says that some cannot.
    """

    a: str
    b: str
    config: tuple[Change, ...]
    metrics: tuple[Change, ...]
    modules: tuple[ModuleDiff, ...]
    total: ModuleDiff


def diff(a: Source, b: Source, registry: Registry | None = None) -> Diff:
    """Compare two adapters, folders or versions, without a base and without torch.

    Raises NotFoundError, and DamagedError if one is not complete or not finite.
    """
    with opened(registry) as store:
        folders = [locate(source, store) for source in (a, b)]
        metrics = [
            _metrics(source, folder.name, store)
            for source, folder in zip((a, b), folders, strict=True)
        ]
        one, two = (read_adapter(folder) for folder in folders)
        for adapter in (one, two):
            adapter.require_sound()
        modules = tuple(_modules(one, two))
    config = _changes(_fields(one), _fields(two))
    return Diff(
        folders[0].name, folders[1].name, config, _changes(*metrics), modules, _total(modules)
    )


def _metrics(source: Source, name: str, registry: Registry) -> Mapping[str, float]:
    if isinstance(source, str) and not isinstance(parse_source(source), PathSource):
        return registry.metrics(name)
    return {}


def _fields(adapter: Adapter) -> dict[str, Any]:
    info = summarize(adapter, digest=False)
    found = {"kind": info.kind, "variant": info.variant, "modules": info.n_modules}
    found |= {"ranks": {str(r): n for r, n in sorted(info.ranks.items())}}
    found |= {"targets": list(info.targets), "parameters": info.n_parameters}
    found["dtypes"] = dict(info.dtypes)
    return found | {f"config.{name}": _plain(value) for name, value in adapter.config.items()}


def _plain(value: Any) -> Any:
    """Lists of names mean sets in a config."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Change, ...]:
    names = [*a, *(name for name in b if name not in a)]
    pairs = [(name, a.get(name), b.get(name)) for name in names]
    return tuple(Change(name, one, two) for name, one, two in pairs if one != two)


def _modules(a: Adapter, b: Adapter) -> Iterator[ModuleDiff]:
    shared = {""} if a.shared or b.shared else set()
    for name in sorted(a.modules.keys() | b.modules.keys() | shared):
        one, two = parts_of(a, name), parts_of(b, name)
        relative = bool(one.whole or two.whole)
        if one.factors or two.factors:
            yield _weights(name, one, two, relative)
        if one.shift is not None or two.shift is not None:
            yield _vectors(name, BIAS, one.shift, two.shift)
        for part in dict.fromkeys((*one.whole, *two.whole)):
            yield _whole(name, part, one, two)


def _weights(name: str, one: Parts, two: Parts, relative: bool) -> ModuleDiff:
    a, b = norm(one), norm(two)
    if one.factors and two.factors and _shape(one) != _shape(two):
        return ModuleDiff(name, WEIGHT, a, b, None, None, relative)
    apart = distance(one, two)
    return ModuleDiff(name, WEIGHT, a, b, apart, _cosine(inner(one, two), a, b), relative)


def _shape(parts: Parts) -> tuple[int, int]:
    b, a = parts.factors[0]
    return b.shape[0], a.shape[1]


def _vectors(name: str, part: str, one: Any, two: Any) -> ModuleDiff:
    import numpy as np

    one = np.zeros_like(two) if one is None else one
    two = np.zeros_like(one) if two is None else two
    a, b = (float(np.linalg.norm(vector)) for vector in (one, two))
    if one.shape != two.shape:
        return ModuleDiff(name, part, a, b, None)
    apart = float(np.linalg.norm(one - two))
    return ModuleDiff(name, part, a, b, apart, _cosine(float((one * two).sum()), a, b))


def _whole(name: str, part: str, one: Parts, two: Parts) -> ModuleDiff:
    """Of what replaces a part of the base both sides can be compared, if both have it."""
    import numpy as np

    x, y = one.whole.get(part), two.whole.get(part)
    if x is None or y is None or x.shape != y.shape:
        return ModuleDiff(name, part, None, None, None, None, True)
    return ModuleDiff(name, part, None, None, float(np.linalg.norm(x - y)), None, True)


def _cosine(product: float, a: float, b: float) -> float | None:
    return max(-1.0, min(1.0, product / (a * b))) if a and b else None


def _total(modules: tuple[ModuleDiff, ...]) -> ModuleDiff:
    """Over everything that has norms; a distance only when every one of them has."""
    known = [m for m in modules if m.a is not None]
    a, b = math.hypot(*(m.a or 0.0 for m in known)), math.hypot(*(m.b or 0.0 for m in known))
    needs_base = any(m.needs_base for m in modules)
    distances = [m.distance for m in known if m.distance is not None]
    if len(distances) < len(known):
        return ModuleDiff("", "all", a, b, None, None, needs_base)
    apart = math.hypot(*distances)
    # The law of cosines, of the angle between two changes as vectors.
    product = (a * a + b * b - apart * apart) / 2
    return ModuleDiff("", "all", a, b, apart, _cosine(product, a, b), needs_base)
