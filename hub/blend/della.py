"""DELLA: drop with a probability that falls with the magnitude's rank in its row.

Deep et al. 2024, arXiv:2406.11617.  The r-th smallest of n entries of a row is kept with
probability density - epsilon / 2 + epsilon r / (n - 1), and divided by it.  mergekit takes twice
the epsilon, and rescales to the L1 norm that the change had.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from adapterkit.hub.blend import pruning
from adapterkit.hub.blend.factors import Term
from adapterkit.hub.blend.masks import Draws
from adapterkit.hub.blend.pruning import Merge, Prune
from adapterkit.hub.blend.settings import Place
from adapterkit.hub.blend.streamed import Streamed
from adapterkit.hub.blend.ties import disjoint_mean
from adapterkit.registry.errors import InvalidError


def ties(terms: Sequence[Term], place: Place) -> Streamed:
    return _matrix(terms, place, partial(disjoint_mean, place.settings))


def linear(terms: Sequence[Term], place: Place) -> Streamed:
    return _matrix(terms, place, pruning.weighted_sum)


def _matrix(terms: Sequence[Term], place: Place, merge: Merge) -> Streamed:
    settings = place.settings
    to_norm = settings.dialect == "mergekit"
    spread = settings.epsilon if to_norm else settings.epsilon / 2
    low, high = settings.density - spread, settings.density + spread
    if low <= 0 or high > 1:
        raise InvalidError(
            f"della keeps entries with probabilities from {low:g} to {high:g}: density"
            f" {settings.density:g} with epsilon {settings.epsilon:g} leaves 0 to 1"
        )
    prunes = [_prune(place.masks(term), low, high, rescale=not to_norm) for term in terms]
    if to_norm:
        prunes = [pruning.to_norm(*pair) for pair in zip(terms, prunes, strict=True)]
    return pruning.merged(terms, prunes, merge)


def _prune(masks: Draws, low: float, high: float, *, rescale: bool) -> Prune:
    def prune(rows: Tensor, start: int) -> Tensor:
        ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1)
        keep = low + (high - low) * ranks / max(rows.shape[1] - 1, 1)
        draws = masks.uniform(start * rows.shape[1], rows.numel()).reshape(rows.shape)
        return torch.where(draws < keep, rows / keep if rescale else rows, 0.0)

    return prune
