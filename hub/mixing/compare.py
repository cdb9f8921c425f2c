"""How alike the changes of several adapters are, from their factors alone.

Everything is computed from products of thin matrices; only the share of conflicting signs, which is
a matter of single entries, is counted on a sample of rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.hub.bases.base import Base
from adapterkit.hub.convert import Options as Reading
from adapterkit.hub.convert import fitting
from adapterkit.hub.locate import Source, locate
from adapterkit.hub.mixing.inputs import Input, read_inputs, require_weights
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import ConflictError, InvalidError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.hub.blend.factors import Factors
    from adapterkit.registry import Registry

# Rows on which signs are counted.
SAMPLE = 256


@dataclass(frozen=True)
class Likeness:
    """Two changes of one module, or, with module "", of all modules that either changes.

    a, b: their norms. cosine: of the two as vectors; 1 is the same direction, 0 nothing in common.
    outputs, inputs: mean squared cosine of the principal angles between what they write to and what
    they read (Bjorck and Golub 1973); 1 where the smaller subspace lies in the larger.
    conflict: share of the entries at which they pull in opposite directions, of those that both
    change, on a sample of rows. interference: share of each one's squared norm that lies where the
    other acts, on both sides, on average of the two: what is at stake when they are added.
    """

    module: str
    a: float
    b: float
    cosine: float | None
    outputs: float | None
    inputs: float | None
    conflict: float | None
    interference: float | None


@dataclass(frozen=True)
class Pair:
    """a, b: names of adapters. modules: those that both change, and `total` of all."""

    a: str
    b: str
    total: Likeness
    modules: tuple[Likeness, ...]


@dataclass(frozen=True)
class Comparison:
    names: tuple[str, ...]
    pairs: tuple[Pair, ...]


def compare(
    sources: Sequence[Source],
    *,
    base: str | Path | Base | None = None,
    quantization: str | None = None,
    registry: Registry | None = None,
    allow_fields: Collection[str] = (),
) -> Comparison:
    """Every pair of the adapters. base: needed where a change refers to the base's weights.

    Raises InvalidError for fewer than two, or for what is no change of weights.
    """
    if len(sources) < 2:
        raise InvalidError("give two adapters or more to compare")
    described = _described(sources, base, quantization, registry, allow_fields)
    given = [(source, 1.0) for source in sources]
    inputs = read_inputs(given, described, quantization, registry, allow_fields)
    require_weights(inputs)
    inputs.sort(key=lambda one: one.given)
    names = tuple(one.name for one in inputs)
    if len(set(names)) < len(names):
        raise ConflictError("the same adapter is listed twice")
    changes = {one.name: _changes(one) for one in inputs}
    pairs = tuple(
        _pair(a, b, changes[a], changes[b]) for a, b in combinations(names, 2)
    )
    return Comparison(names, pairs)


def _described(
    sources: Sequence[Source], base: Any, quantization: str | None, registry: Registry | None,
    allow_fields: Collection[str],
) -> Base | None:  # fmt: skip
    if base is None:
        return None
    reading = Reading(quantization=quantization, allow_fields=allow_fields)
    for source in sources:
        folder = locate(source, registry)
        base = fitting(folder, read_adapter(folder, allow_fields), base, reading) or base
    described: Base = base
    return described


def _changes(one: Input) -> dict[str, Factors]:
    """Module -> factors of its change. A change that has none is refused by name."""
    from adapterkit.hub.blend.factors import Factors
    from adapterkit.hub.mixing.terms import at

    found = {}
    for module in one.modules:
        (term,) = at(module, [one], [1.0], apart=False).terms
        if term.rest is not None:
            raise InvalidError(
                f"{one.name}: the change of {module} has no factors to compare",
                hint="adapter convert --rank R makes them",
            )
        whole = term.factors.folded()
        found[module] = Factors(whole.B.double(), whole.A.double())
    return found


def _pair(a: str, b: str, left: dict[str, Factors], right: dict[str, Factors]) -> Pair:
    from adapterkit.hub.blend.factors import norm

    both = [module for module in left if module in right]
    rows = tuple(_likeness(module, left[module], right[module]) for module in both)
    size_a, size_b = (math.hypot(*map(norm, changes.values())) for changes in (left, right))
    dot = math.fsum((row.cosine or 0.0) * row.a * row.b for row in rows)
    total = Likeness(
        "",
        size_a,
        size_b,
        cosine=dot / (size_a * size_b) if size_a and size_b else None,
        outputs=_mean([(row.outputs, row.a * row.b) for row in rows]),
        inputs=_mean([(row.inputs, row.a * row.b) for row in rows]),
        conflict=_mean([(row.conflict, 1.0) for row in rows]),
        interference=_mean([(row.interference, row.a**2 + row.b**2) for row in rows]),
    )
    return Pair(a, b, total, rows)


def _mean(values: Sequence[tuple[float | None, float]]) -> float | None:
    """Of those that are known, each by its weight."""
    known = [(value, weight) for value, weight in values if value is not None and weight]
    whole = math.fsum(weight for _, weight in known)
    return math.fsum(value * weight for value, weight in known) / whole if whole else None


def _likeness(module: str, a: Factors, b: Factors) -> Likeness:
    from adapterkit.hub.blend.factors import inner, norm

    sizes = norm(a), norm(b)
    if not all(sizes):
        return Likeness(module, *sizes, None, None, None, None, None)
    sides = (_basis(a.B), _basis(b.B)), (_basis(a.A.T), _basis(b.A.T))
    (out_a, out_b), (in_a, in_b) = sides
    shares = _inside(a, out_b, in_b) / sizes[0] ** 2, _inside(b, out_a, in_a) / sizes[1] ** 2
    return Likeness(
        module,
        sizes[0],
        sizes[1],
        cosine=max(-1.0, min(1.0, inner(a, b) / (sizes[0] * sizes[1]))),
        outputs=_overlap(out_a, out_b),
        inputs=_overlap(in_a, in_b),
        conflict=_conflict(a, b),
        interference=min(sum(shares) / 2, 1.0),
    )


def _basis(vectors: Tensor) -> Tensor:
    """Orthonormal columns that span these (n, r)."""
    import torch

    u, values, _ = torch.linalg.svd(vectors, full_matrices=False)
    found: Tensor = u[:, values > values[:1] * 1e-10]
    return found


def _overlap(a: Tensor, b: Tensor) -> float:
    smaller = min(a.shape[1], b.shape[1])
    return min(float((a.T @ b).square().sum()) / smaller, 1.0)


def _inside(change: Factors, outputs: Tensor, inputs: Tensor) -> float:
    """The squared norm of the change between these subspaces."""
    return float(((outputs.T @ change.B) @ (change.A @ inputs)).square().sum())


def _conflict(a: Factors, b: Factors) -> float | None:
    """Rows at even distances, so that every part of the outputs is seen."""
    step = max(1, a.shape[0] // SAMPLE)
    x, y = a.B[::step] @ a.A, b.B[::step] @ b.A
    both = (x != 0) & (y != 0)
    n_both = int(both.sum())
    return float(((x * y < 0) & both).sum()) / n_both if n_both else None
