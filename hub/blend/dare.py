"""DARE: drop at random and rescale.  Yu et al. 2023, arXiv:2311.03099.

mergekit rescales to the L1 norm that the change had, not by the density.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from adapterkit.hub.blend import pruning
from adapterkit.hub.blend.factors import Term
from adapterkit.hub.blend.pruning import Merge, Prune
from adapterkit.hub.blend.settings import Place
from adapterkit.hub.blend.streamed import Streamed
from adapterkit.hub.blend.ties import disjoint_mean


def linear(terms: Sequence[Term], place: Place) -> Streamed:
    return _matrix(terms, place, pruning.weighted_sum)


def ties(terms: Sequence[Term], place: Place) -> Streamed:
    return _matrix(terms, place, partial(disjoint_mean, place.settings))


def _matrix(terms: Sequence[Term], place: Place, merge: Merge) -> Streamed:
    to_norm = place.settings.dialect == "mergekit"
    prunes = [
        _to_norm(term, place) if to_norm else pruning.at_random(term, place) for term in terms
    ]
    return pruning.merged(terms, prunes, merge)


def _to_norm(term: Term, place: Place) -> Prune:
    """Random pruning after which the sum of magnitudes is what it was."""
    plain = pruning.at_random(term, place, rescale=False)
    before, after = _sum(pruning.streamed(term)), _sum(_pruned(term, plain))
    factor = before / after if after else 1.0
    return lambda rows, start: plain(rows, start) * factor


def _pruned(term: Term, prune: Prune) -> Streamed:
    return Streamed(term.shape, lambda start, stop: prune(term.rows(start, stop), start))


def _sum(matrix: Streamed) -> float:
    return sum(float(rows.abs().sum(dtype=torch.float64)) for _, rows in matrix.blocks())
