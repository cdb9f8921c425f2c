"""The few updates every kind is lowered to; engines know these and nothing else.

For a module with weight W (out, in), bias b and input x, the output is y = rho * (W+ P x + b+).

*Additive* updates add, in any order: W+ = W + sum w_k delta_k, b+ = b + sum w_k beta_k.
*Gains* act outside that sum: rho = prod (1 + w_k (l_k - 1)), P the same for inputs, where rotations
take part in the order given. An embedding counts as W = table transposed (width, rows), which
multiplies one-hot inputs.

*Layer* updates act at a place of a layer (`bases/places.py`): one after the other, on rows of the
batch or parts of the sequence, averaged or fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.hub.bases.places import Place
from adapterkit.hub.fields import Mixing, Wiring

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
class GatedLowRank:
    """W x + g(x) B A x, g(x) = mean over positions of sigmoid(gate x + gate_bias).  B (out, r), A
    (r, in), gate (k, in), gate_bias (k): of k gates, each is the factor of as many ranks.  It is
    additive, but no change of a weight, as the factor depends on the input."""

    B: Tensor
    A: Tensor
    gate: Tensor
    gate_bias: Tensor


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


@dataclass(frozen=True, eq=False)
class PrefixKV:
    """Keys and values in front of those of one attention.  k, v (n, heads * head size).

    heads: as the adapter records them, None where it does not. shifts: the real tokens stand at
    positions behind it. gate (1 or 2, width) with gate_bias: k and v count as often as the mean
    over positions of sigmoid(gate x + gate_bias), x being the input of the attention; two rows are
    one for k and one for v.
    """

    k: Tensor
    v: Tensor
    heads: int | None = None
    shifts: bool = True
    gate: Tensor | None = None
    gate_bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """Rows among the embedded tokens.  e (n, width).

    place: "front": before them; "flagged": instead of those that the caller marks; "embedded" and
    "embedded_after_first": before, or after the first of, what the embedding block makes of them,
    so that they have no position.
    """

    e: Tensor
    place: str = "front"


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """u(z) = scale (up act(down z + down_bias) + up_bias), added at a place of a layer.

    down (d, h), up (h, d), biases (d) and (h); scale: a number or, trained, (1) or (h).
    norm_before, norm_after (2, h): weight and bias of a layer norm of z, and of the sum.
    gate (h + 1): weights and bias of a sigmoid; its mean over the sequence multiplies u.
    act: a name of transformers' `ACT2FN`. wiring: what z is, and what u is added to.
    """

    place: Place
    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    act: str = "relu"
    scale: float | Tensor = 1.0
    norm_before: Tensor | None = None
    norm_after: Tensor | None = None
    gate: Tensor | None = None
    wiring: Wiring = Wiring()


@dataclass(frozen=True, eq=False)
class Coupling:
    """y1 = x1 + F(x2), y2 = x2 + G(y1) on the halves of what a place gives.  Dinh et al. 2014,
    arXiv:1410.8516.  F and G: down (d, n_in), its bias, up (n_out, d), its bias."""

    place: Place
    F: tuple[Tensor, Tensor, Tensor, Tensor]
    G: tuple[Tensor, Tensor, Tensor, Tensor]
    act: str = "relu"


@dataclass(frozen=True, eq=False)
class Fusion:
    """softmax_i(q z . k u_i) sum of v u_i, over the bottlenecks that `names` are joined of.

    query, key (h, h + 1): weights and bias side by side; value (h, h); None for the identity.
    """

    place: Place
    names: tuple[str, ...]
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mixing: Mixing = Mixing()


@dataclass(frozen=True, eq=False)
class Intervention:
    """h + R^T (act(W h + b) - R h) behind a layer, at its first and last real tokens.  source W
    (r, h), source_bias b (r), projection R (r, h).  first, last: how many tokens at both ends.
    act: None for none. subtracts: whether R h is taken out."""

    source: Tensor
    source_bias: Tensor
    projection: Tensor
    first: int = 0
    last: int = 0
    act: str | None = None
    subtracts: bool = True


@dataclass(frozen=True, eq=False)
class Head:
    """Linear layers in place of the module's output, `act` between them; first: on the first token
    of what it gets.  weights (n_out, n_in) and biases (n_out) in order; not to be mixed."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    act: str | None = None
    first: bool = False


@dataclass(frozen=True, eq=False)
class FirstToken:
    """The first token of the module's input in place of its output."""


Additive = LowRank | RowScale | BiasShift | DenseDelta | Replace
Gain = OutputGain | InputGain | InputRotation
Context = PrefixKV | VirtualTokens
Layer = Bottleneck | Coupling | Fusion
Primitive = Additive | Gain | GatedLowRank | Layer | Context | Intervention | Head | FirstToken
