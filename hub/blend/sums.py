"""Exact sums of changes, and their best approximation: no entry of a change is ever formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from adapterkit.hub.blend.factors import Factors, Term, concatenated, inner, norm
from adapterkit.hub.blend.pruning import weighted
from adapterkit.hub.blend.settings import Blended, Place
from adapterkit.hub.blend.streamed import low_rank
from adapterkit.hub.blend.truncate import spectrum
from adapterkit.registry.errors import InvalidError

# Below this angle the two directions are one, and the sines of slerp lose their digits.
LEAST_ANGLE = 1e-6


def total(terms: Sequence[Term], place: Place) -> Blended:
    """sum w_k B_k A_k, of rank sum r_k; the best part of it where a rank is asked for."""
    return _ranked(terms, place.settings.rank)


def svd(terms: Sequence[Term], place: Place) -> Blended:
    """The best approximation of the sum by the rank asked for, else the largest of the inputs."""
    return _ranked(terms, place.settings.rank_of(terms))


def average(terms: Sequence[Term], place: Place) -> Blended:
    """The sum with weights that add up to 1."""
    whole = math.fsum(term.weight for term in terms)
    if whole == 0:
        raise InvalidError(f"{place.name}: weights that add up to 0 have no average")
    parts = [replace(term, weight=term.weight / whole) for term in terms]
    return total(parts, place)


def slerp(terms: Sequence[Term], place: Place) -> Blended:
    """Along the arc between two changes, seen as vectors; t is the second weight's share.

    Shoemake 1985. Parallel changes, and those of which one is 0, go along the line between them.
    """
    if len(terms) != 2:
        raise InvalidError(f"slerp is between two adapters, found {len(terms)} at {place.name}")
    first, second = terms
    whole = first.weight + second.weight
    if whole <= 0 or min(first.weight, second.weight) < 0:
        raise InvalidError(
            f"slerp takes two weights of which none is negative, found {first.weight:g} and"
            f" {second.weight:g}"
        )
    t = second.weight / whole
    shares = _arc(first.factors, second.factors, t)
    parts = [Term(share, term.factors) for share, term in zip(shares, terms, strict=True)]
    return total(parts, place)


def _arc(a: Factors, b: Factors, t: float) -> tuple[float, float]:
    size = norm(a) * norm(b)
    cosine = inner(a, b) / size if size else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < LEAST_ANGLE:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _ranked(terms: Sequence[Term], rank: int | None) -> Blended:
    if any(term.rest is not None for term in terms):
        if rank is None:
            raise InvalidError("a sum with changes that have no factors needs a rank")
        return Blended(*low_rank(weighted(terms), rank))
    whole = concatenated(terms)
    if rank is None or whole.rank <= rank:
        return Blended(whole)
    found = spectrum(whole)
    return Blended(found.truncated(rank), found.error(rank))
