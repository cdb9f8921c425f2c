"""The best approximation of a change by one of lower rank, without ever forming the change.

B A = Q_B (R_B R_A^T) Q_A^T, and the SVD of the small middle matrix is that of the whole.  The Gram
matrices of both factors give the same with two thin products, and half the digits where a factor is
ill-conditioned: there, QR.  Optimal by Eckart and Young 1936.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.hub.blend.factors import Factors

# The Gram matrix squares the condition number: beyond this its float64 digits no longer reach
# single precision, as with duplicate or cancelling adapters.
MAX_CONDITION = 1e9


@dataclass(frozen=True, eq=False)
class Spectrum:
    """B A = left diag(values) right.  left (out, R) and right (R, in) are not formed: they are
    `B @ to_left` and `to_right @ A`.  values (R) descending, float64.
    dtype: of the factors it was made of."""

    factors: Factors
    values: Tensor
    to_left: Tensor
    to_right: Tensor
    dtype: torch.dtype

    def truncated(self, rank: int) -> Factors:
        """The best change of that rank; singular values shared between both factors."""
        root = self.values[:rank].sqrt()
        b = self.factors.B @ (self.to_left[:, :rank] * root).to(self.factors.B.dtype)
        a = (root[:, None] * self.to_right[:rank]).to(self.factors.A.dtype) @ self.factors.A
        return Factors(b.to(self.dtype), a.to(self.dtype))

    def left(self) -> Tensor:
        """Left singular vectors (out, R), float64."""
        return self.factors.B.double() @ self.to_left

    def right(self) -> Tensor:
        """Right singular vectors (R, in), float64."""
        return self.to_right @ self.factors.A.double()

    def error(self, rank: int) -> float:
        """|B A - truncated| / |B A|, 0 for a change that is none."""
        energy = self.values.square()
        total = float(energy.sum())
        return (float(energy[rank:].sum()) / total) ** 0.5 if total else 0.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of the squared norm, at least 1."""
        kept = self.values.square().cumsum(0)
        if not kept.numel() or not kept[-1]:
            return 1
        return int((kept < energy * kept[-1]).sum().clamp(max=len(kept) - 1)) + 1


def spectrum(factors: Factors) -> Spectrum:
    """The singular value decomposition of a change, in float64, in O((out + in) R^2)."""
    factors = factors.folded()
    if factors.rank > min(factors.shape):  # thinner than its factors
        return _by_qr(factors)
    b, a = factors.B.double(), factors.A.double()
    left, right = _halves(b.T @ b), _halves(a @ a.T)
    if left is None or right is None:
        return _by_qr(factors)
    (root_b, inverse_b), (root_a, inverse_a) = left, right
    u, values, v = torch.linalg.svd(root_b @ root_a.T)
    return Spectrum(factors, values, inverse_b @ u, v @ inverse_a.T, factors.A.dtype)


def _halves(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """(root, inverse) with root^T root = gram and columns X inverse orthonormal for gram = X^T X;
    None where gram is too ill-conditioned to tell."""
    scale = gram.diagonal().clamp(min=0).sqrt()
    if not bool((scale > 0).all()):
        return None
    # columns of very different size are no trouble once each has length 1
    values, vectors = torch.linalg.eigh(gram / scale[:, None] / scale)
    if values[0] * MAX_CONDITION < values[-1]:
        return None
    root = values.sqrt()
    return (root[:, None] * vectors.T) * scale, (vectors / root) / scale[:, None]


def _by_qr(factors: Factors) -> Spectrum:
    """The same through orthonormal bases of both factors, which survive any condition number."""
    q_b, r_b = torch.linalg.qr(factors.B.double())
    q_a, r_a = torch.linalg.qr(factors.A.double().T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T)
    small = Factors(q_b, q_a.T)
    return Spectrum(small, values, u[:, : len(values)], v[: len(values)], factors.A.dtype)
