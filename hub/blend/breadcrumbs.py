"""Model breadcrumbs: drop the largest entries and the small ones, keep what lies between.

Davari and Belilovsky 2023, arXiv:2312.06795.  Of n entries the gamma n largest are outliers and
dropped, the density n next ones are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapterkit.hub.blend import pruning
from adapterkit.hub.blend.factors import Term
from adapterkit.hub.blend.pruning import Prune
from adapterkit.hub.blend.settings import Place
from adapterkit.hub.blend.streamed import Streamed, magnitude_at
from adapterkit.registry.errors import InvalidError


def matrix(terms: Sequence[Term], place: Place) -> Streamed:
    settings = place.settings
    if settings.density + settings.gamma > 1:
        raise InvalidError(
            f"density {settings.density:g} and gamma {settings.gamma:g} are more than all entries"
        )
    prunes = [_between(term, settings.gamma, settings.density) for term in terms]
    return pruning.merged(terms, prunes, pruning.weighted_sum)


def _between(term: Term, gamma: float, density: float) -> Prune:
    n_entries = term.shape[0] * term.shape[1]
    dropped, kept = int(gamma * n_entries), int(density * n_entries)
    most = magnitude_at(pruning.streamed(term), dropped)
    least = magnitude_at(pruning.streamed(term), dropped + kept)
    return lambda rows, _: torch.where((rows.abs() >= least) & (rows.abs() < most), rows, 0.0)
