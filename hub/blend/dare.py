"""DARE: drop at random and rescale.  Yu et al. 2023, arXiv:2311.03099.

mergekit rescales to the L1 norm that the change had, not by the density, and its dare_ties is the
sum of what agrees, not the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from adapterkit.hub.blend import pruning
from adapterkit.hub.blend.factors import Term
from adapterkit.hub.blend.pruning import Merge
from adapterkit.hub.blend.settings import Place
from adapterkit.hub.blend.streamed import Streamed
from adapterkit.hub.blend.ties import disjoint_mean


def linear(terms: Sequence[Term], place: Place) -> Streamed:
    return _matrix(terms, place, pruning.weighted_sum)


def ties(terms: Sequence[Term], place: Place) -> Streamed:
    divided = place.settings.dialect != "mergekit"
    return _matrix(terms, place, partial(disjoint_mean, place.settings, divided=divided))


def _matrix(terms: Sequence[Term], place: Place, merge: Merge) -> Streamed:
    to_norm = place.settings.dialect == "mergekit"
    prunes = [pruning.at_random(term, place, rescale=not to_norm) for term in terms]
    if to_norm:
        prunes = [pruning.to_norm(*pair) for pair in zip(terms, prunes, strict=True)]
    return pruning.merged(terms, prunes, merge)
