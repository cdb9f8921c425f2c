"""Methods that merge in a basis the changes share, so that only small matrices are merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkit.hub.blend.entries import entrywise
from adapterkit.hub.blend.factors import Factors, Term, concatenated
from adapterkit.hub.blend.settings import Blended, Place
from adapterkit.hub.blend.truncate import spectrum


def iso_c(terms: Sequence[Term], place: Place) -> Blended:
    """The weighted sum with all its singular values at their mean.

    Marczak et al. 2025, arXiv:2502.04959. The mean is over the rank of the sum, not over the size
    of the weight: the other singular values of a sum of low-rank changes are 0 and stay 0.
    """
    found = spectrum(concatenated(terms))
    values = found.values[found.values > found.values[:1] * 1e-12]
    level = values.mean().sqrt() if len(values) else values.sum()
    left, right = found.left()[:, : len(values)], found.right()[: len(values)]
    return _cut(Factors((left * level).float(), (level * right).float()), place)


def tsv(terms: Sequence[Term], place: Place) -> Blended:
    """Task singular vectors: the best 1/k of each change, their vectors made orthogonal together.

    Gargiulo et al. 2024, arXiv:2412.00081 (TSV-M): U and V of all changes side by side, each
    replaced by the orthogonal matrix nearest to it.
    """
    left, right, values = [], [], []
    for term in terms:
        found = spectrum(term.factors)
        keep = max(1, term.factors.rank // len(terms))
        left.append(found.left()[:, :keep])
        right.append(found.right()[:keep])
        values.append(term.weight * found.values[:keep])
    u, v = _orthogonal(torch.cat(left, dim=1)), _orthogonal(torch.cat(right).T)
    return _cut(Factors((u * torch.cat(values)).float(), v.T.float()), place)


def _orthogonal(vectors: Tensor) -> Tensor:
    """The matrix of orthonormal columns nearest to these (n, k), n >= k (orthogonal Procrustes)."""
    u, _, v = torch.linalg.svd(vectors, full_matrices=False)
    nearest: Tensor = u @ v
    return nearest


def knots(terms: Sequence[Term], place: Place) -> Blended:
    """KnOTS: the changes in one common basis of outputs, merged by their coordinates in it.

    Stoica et al. 2024, arXiv:2410.19735: [change_1 ... change_k] = U S [V_1 ... V_k], and what is
    merged are the S V_k, whose entries have the size they count for in the change.
    """
    outputs = torch.cat([term.factors.folded().B.double() for term in terms], dim=1)
    # the SVD of the changes side by side is that of R_B blockdiag(A_k), R_B from outputs = Q R_B
    q, r = torch.linalg.qr(outputs)
    parts, start = [], 0
    for term in terms:
        a = term.factors.folded().A.double()
        parts.append(r[:, start : start + len(a)] @ a)
        start += len(a)
    gram = sum((part @ part.T for part in parts[1:]), parts[0] @ parts[0].T)
    _, u = torch.linalg.eigh(gram)
    u = u.flip(1)  # largest first
    coordinates = [
        Term(term.weight, Factors(torch.eye(u.shape[1]), (u.T @ part).float()), term.index)
        for term, part in zip(terms, parts, strict=True)
    ]
    merged = _inner(coordinates, place)
    return _cut(Factors((q @ u).float(), merged), place)


def core(terms: Sequence[Term], place: Place) -> Blended:
    """Merging in core space: one basis of outputs and one of inputs that all changes share, in
    which each is a small square matrix.  Panariello et al. 2025, arXiv:2509.17786."""
    folded = [term.factors.folded() for term in terms]
    left = _basis(torch.cat([f.B.double() for f in folded], dim=1))
    right = _basis(torch.cat([f.A.double() for f in folded]).T)
    coordinates = []
    for term, f in zip(terms, folded, strict=True):
        b, a = left.T @ f.B.double(), f.A.double() @ right
        coordinates.append(Term(term.weight, Factors(b.float(), a.float()), term.index))
    merged = _inner(coordinates, place)
    return _cut(Factors((left @ merged.double()).float(), right.T.float()), place)


def _basis(vectors: Tensor) -> Tensor:
    """Orthonormal columns that span these (n, k)."""
    u, values, _ = torch.linalg.svd(vectors, full_matrices=False)
    basis: Tensor = u[:, : max(1, int((values > values[:1] * 1e-12).sum()))]
    return basis


def _inner(coordinates: Sequence[Term], place: Place) -> Tensor:
    """Small matrices of one shape, merged entry by entry."""
    matrix = entrywise(place.settings.inner)(coordinates, place)
    return torch.cat([rows for _, rows in matrix.blocks()])


def _cut(whole: Factors, place: Place) -> Blended:
    """The best part of it where a rank is asked for."""
    rank = place.settings.rank
    if rank is None or whole.rank <= rank:
        return Blended(whole)
    found = spectrum(whole)
    return Blended(found.truncated(rank), found.error(rank))
