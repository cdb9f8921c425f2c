"""Which entries of a change are kept, and which sign wins where several changes meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from adapterkit.hub.blend.factors import Term
from adapterkit.hub.blend.settings import Place
from adapterkit.hub.blend.streamed import Streamed, magnitude_at

# (rows of a change, first row) -> the same with the dropped entries 0
Prune = Callable[[Tensor, int], Tensor]
# k pruned changes (rows, in) and their weights -> (rows, in)
Merge = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def streamed(term: Term) -> Streamed:
    return Streamed(term.shape, term.rows)


def merged(terms: Sequence[Term], prunes: Sequence[Prune], merge: Merge) -> Streamed:
    """The matrix of `merge` over all changes, each pruned by its own rule."""
    weights = [term.weight for term in terms]

    def block(start: int, stop: int) -> Tensor:
        rows = [
            prune(term.rows(start, stop), start)
            for term, prune in zip(terms, prunes, strict=True)
        ]
        return merge(rows, weights)

    return Streamed(terms[0].shape, block)


def by_magnitude(term: Term, density: float) -> Prune:
    """Keeps the int(density n) entries of largest magnitude; ties of magnitude stay together."""
    n_entries = term.shape[0] * term.shape[1]
    least = np.float32(magnitude_at(streamed(term), int(density * n_entries)))
    below = float(np.nextafter(least, np.float32(-np.inf)))  # which hardshrink drops too
    return lambda rows, _: torch.nn.functional.hardshrink(rows, below)


def at_random(term: Term, place: Place, *, rescale: bool = True) -> Prune:
    """Keeps each entry with probability density; divided by it, so that the mean stays.
    DARE, Yu et al. 2023, arXiv:2311.03099."""
    density, masks = place.settings.density, place.masks(term)

    def prune(rows: Tensor, start: int) -> Tensor:
        chosen = masks.chosen(start * rows.shape[1], rows.numel(), density)
        kept = chosen.view(rows.shape).mul_(rows)
        return kept.div_(density) if rescale else kept

    return prune


def to_norm(term: Term, prune: Prune) -> Prune:
    """The same, after which the sum of magnitudes is what it was."""
    before = _sum(streamed(term))
    after = _sum(Streamed(term.shape, lambda start, stop: prune(term.rows(start, stop), start)))
    factor = before / after if after else 1.0
    return lambda rows, start: prune(rows, start).mul_(factor)


def _sum(matrix: Streamed) -> float:
    return sum(float(rows.abs().sum(dtype=torch.float64)) for _, rows in matrix.blocks())


def weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = changes[0] * weights[0]
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total.add_(change, alpha=weight)
    return total


def elected(changes: Tensor, sign: str) -> Tensor:
    """1 where each change has the sign that wins at its entry, else 0; (k, rows, in). A sum of 0
    counts as positive, and an entry that is 0 agrees with neither sign."""
    # numbers throughout: torch takes several times longer over booleans
    signs = changes.sign()
    votes = changes.sum(0) if sign == "total" else signs.sum(0)
    winning = votes.sign_().add_(0.5).sign_()
    return signs.mul_(winning).relu_()


def linear(terms: Sequence[Term], place: Place) -> Streamed:
    """Nothing is pruned."""
    return weighted(terms)


def weighted(terms: Sequence[Term]) -> Streamed:
    """The weighted sum, row by row."""
    return merged(terms, [lambda rows, _: rows] * len(terms), weighted_sum)
