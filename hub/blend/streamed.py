"""Changes that act on single entries, seen row block by row block, and their best low-rank part.

Randomized SVD: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4 (subspace
iteration) with the test matrix drawn from a fixed, counter-based stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapterkit.hub.blend.factors import Factors

# Entries seen at a time: bounds the memory beside the inputs to a few times 4 MB.
ENTRIES = 1 << 20
# Entries computed at a time where a whole matrix is: with those of all inputs they stay in a
# processor's cache, and memory is not asked of the system again and again.
CACHED = 1 << 16
# Entries of a matrix that is computed once and kept; a larger one is computed for every pass.
KEPT = 1 << 27
# Columns beyond the rank wanted, and rounds of subspace iteration: with them the error is within
# a fraction of a percent of the optimum on flat spectra too, such as those of pruned changes.
OVERSAMPLING = 16
ROUNDS = 2
SEED = 0x5EED
# Matrices this thin are decomposed as they are, which is as fast.
THIN = 512


@dataclass(frozen=True, eq=False)
class Streamed:
    """A matrix (out, in) by blocks of rows: block(start, stop) -> (stop - start, in), float32."""

    shape: tuple[int, int]
    block: Callable[[int, int], Tensor]

    def blocks(self, entries: int = ENTRIES) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows), from the top."""
        n_rows, width = self.shape
        step = max(1, entries // max(width, 1))
        for start in range(0, n_rows, step):
            yield start, self.block(start, min(start + step, n_rows))

    def kept(self) -> Streamed:
        """The same, computed once where it is not too large for that."""
        if self.shape[0] * self.shape[1] > KEPT:
            return self
        whole = self.whole()
        return Streamed(self.shape, lambda start, stop: whole[start:stop])

    def whole(self) -> Tensor:
        found = torch.empty(self.shape)
        for start, rows in self.blocks(CACHED):
            found[start : start + len(rows)] = rows
        return found


def low_rank(matrix: Streamed, rank: int) -> tuple[Factors, float]:
    """(the best part of that rank, |matrix - it| / |matrix|). Exact for thin matrices."""
    matrix = matrix.kept()
    if min(matrix.shape) <= THIN:
        u, values, v = torch.linalg.svd(matrix.whole().double(), full_matrices=False)
        energy = values.square().sum().item()
    else:
        basis, energy = _range(matrix, min(rank + OVERSAMPLING, *matrix.shape))
        small = _transposed_times(matrix, basis).T  # (size, in)
        u, values, v = torch.linalg.svd(small.double(), full_matrices=False)
        u = basis.double() @ u
    root = values[:rank].sqrt()
    kept = values[:rank].square().sum().item()
    error = max(1 - kept / energy, 0.0) ** 0.5 if energy else 0.0
    return Factors((u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()), error


def _range(matrix: Streamed, size: int) -> tuple[Tensor, float]:
    """(orthonormal columns (out, size) that hold most of the matrix, its squared norm)."""
    generator = np.random.Generator(np.random.Philox(SEED))
    probe = generator.standard_normal((matrix.shape[1], size), np.float32)
    y, energy = _times(matrix, torch.from_numpy(probe))
    for _ in range(ROUNDS):
        q = torch.linalg.qr(_transposed_times(matrix, torch.linalg.qr(y).Q)).Q
        y, _ = _times(matrix, q)
    basis: Tensor = torch.linalg.qr(y).Q
    return basis, energy


def _times(matrix: Streamed, x: Tensor) -> tuple[Tensor, float]:
    """(M x (out, k), the squared norm of M).  x (in, k)."""
    found = x.new_empty(matrix.shape[0], x.shape[1])
    energy = 0.0
    for start, rows in matrix.blocks():
        torch.matmul(rows, x, out=found[start : start + len(rows)])
        energy += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
    return found, energy


def _transposed_times(matrix: Streamed, x: Tensor) -> Tensor:
    """M^T x, (in, k).  x (out, k)."""
    found = x.new_zeros(matrix.shape[1], x.shape[1])
    for start, rows in matrix.blocks():
        found.addmm_(rows.T, x[start : start + len(rows)])
    return found


def magnitude_at(matrix: Streamed, kept: int) -> float:
    """The smallest magnitude among the `kept` largest entries; infinity for none of them.

    By the bits of the float32 values: without the sign they order as the values do. Two passes,
    unless all entries are seen at a time.
    """
    if kept <= 0:
        return float("inf")
    if matrix.shape[0] * matrix.shape[1] <= ENTRIES:
        bits = _bits(matrix.block(0, matrix.shape[0]))
        bits.partition(len(bits) - kept)
        return float(bits.view(np.float32)[len(bits) - kept])
    upper = np.zeros(1 << 16, np.int64)
    for _, rows in matrix.blocks():
        upper += np.bincount(_bits(rows) >> 16, minlength=1 << 16)
    bucket, above = _bucket(upper, kept)
    lower = np.zeros(1 << 16, np.int64)
    for _, rows in matrix.blocks():
        bits = _bits(rows)
        lower += np.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    place, _ = _bucket(lower, kept - above)
    bits_found = np.array([bucket << 16 | place], np.uint32)
    return float(bits_found.view(np.float32)[0])


def _bits(rows: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    flat: np.ndarray[tuple[int], np.dtype[np.uint32]] = rows.numpy().reshape(-1).view(np.uint32)
    return flat & np.uint32(0x7FFFFFFF)


def _bucket(counts: np.ndarray[tuple[int], np.dtype[np.int64]], kept: int) -> tuple[int, int]:
    """(the bucket in which the kept-th largest lies, how many lie above that bucket)."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, kept))
    return len(counts) - 1 - place, int(above[place - 1]) if place else 0
