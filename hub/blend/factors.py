"""A change of one weight as a product of two thin matrices, and what these alone tell of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """The change scale B A of a weight (out, in).  B (out, r) and A (r, in), float32 or float64."""

    B: Tensor
    A: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def folded(self, weight: float = 1.0) -> Factors:
        """weight times the change, its scale folded into A; 1 leaves both factors as they are."""
        by = weight * self.scale
        return Factors(self.B, self.A if by == 1 else by * self.A)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the change, (stop - start, in)."""
        rows = self.B[start:stop] @ self.A
        return rows if self.scale == 1 else rows.mul_(self.scale)


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's change of a weight, what it counts, and its place among the inputs.

    rest: further rows [start, stop) of the change, where a part of it has no factors.
    """

    weight: float
    factors: Factors
    index: int = 0
    rest: Callable[[int, int], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the change, not weighted, float32 (stop - start, in)."""
        if self.rest is None:
            return self.factors.rows(start, stop).float()
        rest = self.rest(start, stop)
        return (self.factors.rows(start, stop) + rest if self.factors.rank else rest).float()


def concatenated(terms: Sequence[Term]) -> Factors:
    """The weighted sum of the changes, exactly: the factors side by side, rank sum r_k."""
    parts = [term.factors.folded(term.weight) for term in terms]
    if len(parts) == 1:
        return parts[0]
    return Factors(torch.cat([p.B for p in parts], dim=1), torch.cat([p.A for p in parts]))


def inner(a: Factors, b: Factors) -> float:
    """<a, b>, the sum of products of entries, from r x r products in float64."""
    left = a.B.double().T @ b.B.double()
    right = a.A.double() @ b.A.double().T
    return a.scale * b.scale * float((left * right).sum())


def norm(a: Factors) -> float:
    """The Frobenius norm."""
    return math.sqrt(max(inner(a, a), 0.0))
