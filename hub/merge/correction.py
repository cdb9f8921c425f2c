"""A LoRA that holds the low-rank part of what quantization lost of a weight, and the codes for it.

Codes and factors are chosen in turn, each the best for the other, as LoftQ does for a base alone.
Li et al. 2023, arXiv:2310.08659.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.hub.blend.factors import Factors
from adapterkit.hub.blend.streamed import Streamed, low_rank
from adapterkit.hub.blend.truncate import spectrum
from adapterkit.hub.quant.packing import Packed

ROUNDS = 5
# A round that leaves more than this share of the round before is the last.
WORTH = 0.999


@dataclass(frozen=True, eq=False)
class Corrected:
    """values (out, in): what codes and factors mean together. left: |target - values|^2."""

    packed: Packed
    factors: Factors
    values: Tensor
    left: float


def corrected(
    target: Tensor, packed: Packed, rank: int, pack: Callable[[Tensor], Packed]
) -> Corrected:
    """target (out, in), and what `pack` makes of it."""
    best = _fitted(target, packed, rank)
    for _ in range(ROUNDS - 1):
        factors = best.factors
        found = _fitted(target, pack(target - factors.B @ factors.A), rank)
        worth = found.left < WORTH * best.left
        best = found if found.left < best.left else best
        if not worth:
            break
    return best


def _fitted(target: Tensor, packed: Packed, rank: int) -> Corrected:
    factors = best_of_rank(target - packed.values, rank)
    values = torch.addmm(packed.values, factors.B, factors.A)
    return Corrected(packed, factors, values, squared(target - values))


def rival(base: Tensor, delta: Tensor | Factors, rank: int) -> Tensor:
    """What a weight becomes by the quantized base and a blended adapter of that rank."""
    if isinstance(delta, Tensor):
        best = best_of_rank(delta, rank)
    else:
        best = spectrum(delta).truncated(rank)
    return torch.addmm(base, best.B, best.A)


def best_of_rank(matrix: Tensor, rank: int) -> Factors:
    shape = (matrix.shape[0], matrix.shape[1])
    factors, _ = low_rank(Streamed(shape, lambda start, stop: matrix[start:stop]), rank)
    return factors


def squared(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
