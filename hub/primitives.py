"""The few updates every kind is lowered to; engines know these and nothing else.

For a module with weight W (out, in), bias b and input x, all of class *additive*: with weights w_k,
W+ = W + sum w_k delta_k and b+ = b + sum w_k beta_k, exact and in any order. An embedding counts as
W = table transposed (width, rows), which multiplies one-hot inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """W + scale diag(out_scale) B A.  B (out, r), A (r, in), out_scale (out) or None for ones."""

    B: Tensor
    A: Tensor
    scale: float = 1.0
    out_scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RowScale:
    """W + diag(g) W, bias untouched.  g (out)."""

    g: Tensor


@dataclass(frozen=True, eq=False)
class BiasShift:
    """b + d.  d (out); a module without bias gets one."""

    d: Tensor


@dataclass(frozen=True, eq=False)
class Replace:
    """T0 + w (T - T0) for the parameter `name` of the module, T0 being the base's; at weight 1
    alone it is T bit for bit.  rows: T (len(rows), width) holds only these rows of it."""

    T: Tensor
    name: str = "weight"
    rows: tuple[int, ...] | None = None


Primitive = LowRank | RowScale | BiasShift | Replace
