"""PEFT's dialect: what its add_weighted_adapter does to A and B, each by itself.

peft 0.21 `tuners/lora/model.py` (_generalized_task_arithmetic_weighted_adapter) and
`utils/merge_utils.py`. As both factors are merged apart, products of one adapter's A with another
one's B come in that no adapter had: kept for whoever needs PEFT's own result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkit.hub.blend.entries import entrywise
from adapterkit.hub.blend.factors import Factors, Term
from adapterkit.hub.blend.settings import Blended, Place
from adapterkit.registry.errors import InvalidError


def factorwise(name: str, terms: Sequence[Term], place: Place) -> Blended:
    """The method `name` on A and on B, with sqrt |w s| as weight of both and the sign on A."""
    ranks = sorted({term.factors.rank for term in terms})
    if len(ranks) > 1:
        raise InvalidError(
            f"{place.name}: {name} in PEFT's dialect merges factors of one rank, found {ranks}"
        )
    a = _merged(name, [_half(term, term.factors.A, signed=True) for term in terms], place, ".A")
    b = _merged(name, [_half(term, term.factors.B, signed=False) for term in terms], place, ".B")
    return Blended(Factors(b, a))


def _half(term: Term, factor: Tensor, *, signed: bool) -> Term:
    """One factor as a matrix of its own, which has no factors."""
    strength = term.weight * term.factors.scale
    weight = math.sqrt(abs(strength))
    if signed and strength < 0:
        weight = -weight
    none = Factors(factor.new_empty(factor.shape[0], 0), factor.new_empty(0, factor.shape[1]))
    return Term(weight, none, term.index, lambda start, stop: factor[start:stop])


def _merged(name: str, terms: Sequence[Term], place: Place, part: str) -> Tensor:
    here = Place(f"{place.name}{part}", place.settings, place.draws)
    return entrywise(name)(terms, here).whole()


def clamped(terms: Sequence[Term], place: Place) -> Blended:
    """PEFT's svd with svd_clamp: both factors cut off at a quantile of all their entries.

    The quantile depends on the signs of the singular vectors, so the dense matrix is decomposed as
    PEFT decomposes it; the singular values are all in B.
    """
    dense = _merged("linear", terms, place, "")
    u, values, v = torch.linalg.svd(dense)
    rank = place.settings.rank_of(terms)
    b, a = u[:, :rank] * values[:rank], v[:rank]
    limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), place.settings.clamp or 1.0)
    return Blended(Factors(b.clamp(-limit, limit), a.clamp(-limit, limit)))
