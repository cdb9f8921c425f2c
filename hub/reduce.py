"""A change as one pair of factors: as it is where it has some, else the best of a given rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.hub.blend.factors import Factors, norm
from adapterkit.hub.blend.streamed import Streamed, low_rank
from adapterkit.hub.blend.truncate import spectrum
from adapterkit.hub.change import Change

# Singular values of a matrix whose smaller side is not larger are all computed; of a larger one,
# only those of the rank wanted.
WHOLE = 1024


@dataclass(frozen=True, eq=False)
class Reduced:
    """factors: float64; None where the change has no factors smaller than itself and no rank was
    given. needed: the rank at which it is exact. error: |change - B A| / |change|; size: |change|.
    """

    factors: Factors | None
    needed: int
    error: float
    size: float


def reduced(change: Change, rank: int | None) -> Reduced:
    """At most of that rank; exact where the change allows it."""
    whole = change.factors
    if change.rest is None and (rank is None or whole.rank <= rank):
        return Reduced(whole, whole.rank, 0.0, norm(whole))
    with single_thread():
        if change.rest is None:
            return _of_factors(whole, rank or whole.rank)
        if min(change.shape) <= WHOLE:
            return _of_matrix(change.rows(0, change.shape[0]), rank)
        return _of_rows(change, rank)


def _of_factors(whole: Factors, rank: int) -> Reduced:
    found = spectrum(whole)
    needed = _rank(found.values, whole.shape)
    keep = min(rank, needed)
    size = float(found.values.norm())
    return Reduced(found.truncated(keep), needed, found.error(keep) if keep < needed else 0.0, size)


def _of_matrix(matrix: Tensor, rank: int | None) -> Reduced:
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    n_out, n_in = matrix.shape
    needed = _rank(values, (n_out, n_in))
    size = float(values.norm())
    if rank is None and needed * (n_out + n_in) >= n_out * n_in:
        return Reduced(None, needed, 0.0, size)
    keep = needed if rank is None else min(rank, needed)
    root = values[:keep].sqrt()
    error = float(values[keep:].norm()) / size if keep < needed else 0.0
    return Reduced(Factors(u[:, :keep] * root, root[:, None] * v[:keep]), needed, error, size)


def _of_rows(change: Change, rank: int | None) -> Reduced:
    """Of a change too large for all of its singular values."""
    needed = min(change.shape)
    streamed = Streamed(change.shape, lambda start, stop: change.rows(start, stop).float())
    if rank is None:
        return Reduced(None, needed, 0.0, 0.0)
    found, _ = low_rank(streamed, rank)
    factors = Factors(found.B.double(), found.A.double())
    lost = total = 0.0
    for start, rows in Streamed(change.shape, change.rows).blocks():
        total += float(rows.square().sum())
        lost += float((rows - factors.rows(start, start + len(rows))).square().sum())
    return Reduced(factors, needed, (lost / total) ** 0.5 if total else 0.0, total**0.5)


def _rank(values: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values are no rounding errors of float64."""
    if not len(values):
        return 0
    return int((values > values[0] * max(shape) * 2.0**-50).sum())


@contextmanager
def single_thread() -> Iterator[None]:
    """Sums in one order, so that the same input gives the same bits whatever the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
