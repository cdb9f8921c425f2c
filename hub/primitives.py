"""The few updates every kind is lowered to; engines know these and nothing else.

For a module with weight W (out, in), bias b and input x, the output is y = rho * (W+ P x + b+).

*Additive* updates add, in any order: W+ = W + sum w_k delta_k, b+ = b + sum w_k beta_k.
*Gains* act outside that sum: rho = prod (1 + w_k (l_k - 1)), P the same for inputs, where rotations
take part in the order given. An embedding counts as W = table transposed (width, rows), which
multiplies one-hot inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """W + scale diag(out_scale) B diag(rank_scale) A.  B (out, r), A (r, in), out_scale (out),
    rank_scale (r), both None for ones.  With a rank_scale, A and B may be views of tensors that
    other modules use too, and stay so."""

    B: Tensor
    A: Tensor
    scale: float = 1.0
    out_scale: Tensor | None = None
    rank_scale: Tensor | None = None


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


@dataclass(frozen=True, eq=False)
class DenseDelta:
    """W + D.  D (out, in): as large as the weight, so only where no factors are known."""

    D: Tensor


@dataclass(frozen=True, eq=False)
class OutputGain:
    """diag(l) around the sum, the bias too.  l (out)."""

    l: Tensor  # noqa: E741 (its name in the formula)


@dataclass(frozen=True, eq=False)
class InputGain:
    """x scaled before the product.  l (in)."""

    l: Tensor  # noqa: E741 (its name in the formula)


@dataclass(frozen=True, eq=False)
class InputRotation:
    """x turned before the product, each run of b inputs by its block: x_i R_i.

    R (n, b, b) with n b = in; (1, b, b) when all runs share one block.
    """

    R: Tensor


Additive = LowRank | RowScale | BiasShift | DenseDelta | Replace
Gain = OutputGain | InputGain | InputRotation
Primitive = Additive | Gain
