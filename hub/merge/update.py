"""What is merged into one parameter: W' = diag(rho) W+ P and b' = rho b+, float32, not rounded yet.

W+ and b+ are the base's with all additive updates (docs/composition.md). Weights are seen by rows
of the file, so that of a large one only a block is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.hub.bases.base import CONV1D, EMBEDDING, Module
from adapterkit.hub.blend.factors import Factors
from adapterkit.hub.compose import gains, replacing
from adapterkit.hub.compose.gains import Gains, rotate
from adapterkit.hub.compose.plan import Replacement, Sums, Weighted, fold, split
from adapterkit.hub.primitives import (
    BiasShift,
    DenseDelta,
    LowRank,
    OutputGain,
    Primitive,
    Replace,
    RowScale,
)
from adapterkit.registry.errors import InvalidError

# The file holds the transpose of what is applied.
TRANSPOSED = (CONV1D, EMBEDDING)


@dataclass(frozen=True, eq=False)
class Update:
    """Of one matrix. left (rows, R), right (R, columns) and D as the file lies; g, rho (out).
    replaced: weights and what takes the place of W, as the file lies."""

    transposed: bool
    replaced: tuple[Replacement, ...] = ()
    left: Tensor | None = None
    right: Tensor | None = None
    D: Tensor | None = None
    g: Tensor | None = None
    gains: Gains = Gains()

    @property
    def is_empty(self) -> bool:
        held = (self.left, self.D, self.g)
        return not self.replaced and self.gains.is_empty and all(each is None for each in held)

    @property
    def factors(self) -> Factors | None:
        """As the file lies; None where anything else changes too."""
        if self.left is None or self.right is None or not replace(self, left=None).is_empty:
            return None
        return Factors(self.left, self.right)

    @property
    def is_whole(self) -> bool:
        """Whether it takes all rows at once."""
        return self.transposed and any(step.ndim > 1 for step in self.gains.steps)

    def applied(self, w: Tensor, start: int = 0, out: Tensor | None = None) -> Tensor:
        """The new rows.  w (n, columns): those of the file from `start`, float32 or float64.
        out: room of the same shape that may be used for them."""
        rows = slice(start, start + len(w))
        new = self._replaced(w, rows)
        if self.g is not None:
            new = new + w * self._along(self.g, rows, outputs=True).to(w.dtype)
        if self.left is not None and self.right is not None:
            left, right = self.left[rows].to(w.dtype), self.right.to(w.dtype)
            new = torch.addmm(new, left, right, out=out)
        if self.D is not None:
            new = new + self.D[rows].to(w.dtype)
        if self.gains.rho is not None:
            new = new * self._along(self.gains.rho, rows, outputs=True).to(w.dtype)
        for step in reversed(self.gains.steps):
            new = self._turned(new, step.to(w.dtype), rows)
        return new

    def _replaced(self, w: Tensor, rows: slice) -> Tensor:
        if not self.replaced:
            return w
        parts = [(weight, _rows_of(new, rows)) for weight, new in self.replaced]
        if len(parts) == 1 and parts[0][0] == 1 and parts[0][1].rows is not None:
            only = parts[0][1]  # bit for bit
            changed = w.clone()
            changed[list(only.rows or ())] = only.T.to(w.dtype)
            return changed
        return replacing.whole(w, [(weight, new) for weight, new in parts if len(new.T)])

    def _along(self, vector: Tensor, rows: slice, *, outputs: bool) -> Tensor:
        """A vector of all outputs, or inputs, that scales the rows or the columns of the file."""
        return vector[rows, None] if outputs != self.transposed else vector[None, :]

    def _turned(self, w: Tensor, step: Tensor, rows: slice) -> Tensor:
        """W P for one step of P: a diagonal, or blocks, x_i R_i, so that W_i becomes W_i R_i^T."""
        if step.ndim == 1:
            return w * self._along(step, rows, outputs=False)
        return rotate(w.mT, step.mT).mT if self.transposed else rotate(w, step.mT)


def _rows_of(new: Replace, rows: slice) -> Replace:
    """The part of a replacement that lies in these rows, counted from their first."""
    if new.rows is None:
        return replace(new, T=new.T.reshape(len(new.T), -1)[rows])
    inside = [i for i, row in enumerate(new.rows) if rows.start <= row < rows.stop]
    return replace(new, T=new.T[inside], rows=tuple(new.rows[i] - rows.start for i in inside))


def of_weight(module: Module, updates: Sequence[Weighted], *, peft: bool = False) -> Update:
    """updates: of all adapters in order, on this module, or on the part of it that is meant."""
    summed, replaced, outside = split(updates)
    new = tuple((w, r) for w, r in replaced if r.name == "weight")
    transposed = module.type in TRANSPOSED
    sums = fold(summed, sequential=peft)
    left, right = _factors(sums)
    dense = sums.D
    if transposed:
        left, right = None if right is None else right.mT, None if left is None else left.mT
        dense = None if dense is None else dense.mT
    around = gains.fold(outside, summed=peft and any(w != 1 for w, _ in outside))
    return Update(transposed, new, left, right, dense, sums.g, around)


def new_bias(
    module: Module, bias: Tensor, updates: Sequence[Weighted], *, peft: bool = False
) -> Tensor:
    """rho (b + sum w (T - b) + sum w d).  bias (out)."""
    summed, replaced, outside = split(updates)
    own = [(w, r) for w, r in replaced if r.name == "bias"]
    new = replacing.whole(bias, own) if own else bias
    shift = fold(summed, sequential=peft).d
    new = new if shift is None else new + shift.to(new.dtype)
    rho = gains.fold(outside, summed=peft and any(w != 1 for w, _ in outside)).rho
    return new if rho is None else new * rho.to(new.dtype)


def moves_bias(updates: Sequence[Weighted]) -> bool:
    """Whether any of them acts on the bias of a module."""
    summed, replaced, outside = split(updates)
    shifts = fold(summed).d is not None or any(r.name == "bias" for _, r in replaced)
    return shifts or any(isinstance(gain, OutputGain) for _, gain in outside)


def _factors(sums: Sums) -> tuple[Tensor | None, Tensor | None]:
    """(B, A), every scale in them, float32."""
    if sums.A is None or sums.B is None:
        return None, None
    b = sums.B if sums.o is None else sums.B * sums.o[:, None]
    a = sums.A if sums.gate is None else sums.A * sums.gate[:, None]
    return b.float(), a.float()


def of_expert(primitive: Primitive, expert: int, rows: slice) -> Primitive:
    """The part of an update of a fused parameter (experts, out, in) that is one expert's rows."""
    if isinstance(primitive, LowRank):
        return replace(
            primitive,
            B=primitive.B[expert][rows],
            A=primitive.A[expert],
            out_scale=_mine(primitive.out_scale, expert, rows),
            rank_scale=_mine(primitive.rank_scale, expert, slice(None)),
        )
    if isinstance(primitive, RowScale):
        return RowScale(primitive.g[expert, rows])
    if isinstance(primitive, DenseDelta):
        return DenseDelta(primitive.D[expert, rows])
    if isinstance(primitive, Replace) and primitive.rows is None:
        return replace(primitive, T=primitive.T[expert, rows], name="weight")
    raise InvalidError(f"{type(primitive).__name__} of fused experts cannot be merged")


def _mine(scale: Tensor | None, expert: int, rows: slice) -> Tensor | None:
    return scale if scale is None or scale.ndim == 1 else scale[expert, rows]


def same(a: Sequence[Weighted], b: Sequence[Weighted], *, turned: bool) -> bool:
    """Whether two modules that share a weight get the same change of it. turned: one of them is
    applied as the transpose of the other."""
    mine, theirs = ([u for u in each if not on_bias(u.primitive)] for each in (a, b))
    return len(mine) == len(theirs) and all(
        x.weight == y.weight and _same(x.primitive, y.primitive, turned)
        for x, y in zip(mine, theirs, strict=True)
    )


def on_bias(primitive: Primitive) -> bool:
    is_replaced = isinstance(primitive, Replace) and primitive.name == "bias"
    return is_replaced or isinstance(primitive, BiasShift)


def _same(a: Primitive, b: Primitive, turned: bool) -> bool:
    if isinstance(a, Replace) and isinstance(b, Replace):
        return a.name == b.name and a.rows == b.rows and torch.equal(a.T, b.T)
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        if {*map(id, (a.out_scale, a.rank_scale, b.out_scale, b.rank_scale))} != {id(None)}:
            return False
        left, right = (b.A.mT, b.B.mT) if turned else (b.B, b.A)
        return a.scale == b.scale and torch.equal(a.B, left) and torch.equal(a.A, right)
    return False
