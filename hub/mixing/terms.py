"""What each input does to one module, in the form the methods take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.hub.blend.factors import Factors, Term
from adapterkit.hub.change import change_of
from adapterkit.hub.findings import clean
from adapterkit.hub.mixing.inputs import Input
from adapterkit.hub.primitives import LowRank, Primitive, RowScale
from adapterkit.registry.errors import InvalidError


@dataclass(frozen=True, eq=False)
class At:
    """One module. terms: of the inputs that change it. g: the weighted sum of their row scales,
    where these were asked to stay apart; shift: of their bias shifts. Both (out), float64."""

    terms: tuple[Term, ...]
    g: Tensor | None
    shift: Tensor | None


def at(module: str, inputs: Sequence[Input], weights: Sequence[float], *, apart: bool) -> At:
    """apart: row scales are kept as such, as a sum of DoRAs is one, and not made part of the
    change. Raises what `change_of` raises for what is no change of a weight."""
    terms, g, shift = [], None, None
    for one, weight in zip(inputs, weights, strict=True):
        if module not in one.modules:
            continue
        made = one.primitives(module)
        if apart:
            scales = [p.g.double() for p in made if isinstance(p, RowScale)]
            made = tuple(p for p in made if not isinstance(p, RowScale))
            for scale in scales:
                g = weight * scale if g is None else g + weight * scale
        term, own_shift = _term(one, module, made, weight)
        terms.append(term)
        if own_shift is not None:
            shift = weight * own_shift if shift is None else shift + weight * own_shift
    return At(tuple(terms), g, shift)


def _term(
    one: Input, module: str, made: Sequence[Primitive], weight: float
) -> tuple[Term, Tensor | None]:
    plain = [p for p in made if isinstance(p, LowRank)]
    if len(plain) == 1 and len(made) == 1 and _is_bare(plain[0]):
        low = plain[0]
        return Term(weight, Factors(low.B, low.A, low.scale), one.index), None
    change = change_of(one.ground, module, made)
    if change is None:
        raise InvalidError(f"{one.name} does nothing to {clean(module)}")
    return Term(weight, change.factors, one.index, change.rest), change.shift


def _is_bare(low: LowRank) -> bool:
    return low.out_scale is None and low.rank_scale is None


def single(terms: Sequence[Term]) -> list[Term]:
    """The same in float32, for methods on entries: in the precision the peers compute in."""
    found = []
    for term in terms:
        factors = term.factors
        f = Factors(factors.B.float(), factors.A.float(), factors.scale)
        found.append(Term(term.weight, f, term.index, term.rest))
    return found


def magnitude(w: Tensor, factors: Factors, g: Tensor) -> tuple[Factors, Tensor]:
    """(factors, m) of the one DoRA that is W + diag(g) W + B A: m / |W + B' A| = 1 + g, of rows.

    w (out, in), g (out), m (out). B' = diag(1 / (1 + g)) B. Exact where no 1 + g is 0
    (DoRA: Liu et al. 2024, arXiv:2402.09353).
    """
    whole = factors.folded()
    b = whole.B / (1 + g)[:, None]
    norms = torch.cat(
        [
            (w[start : start + 1024].double() + b[start : start + 1024] @ whole.A).norm(dim=1)
            for start in range(0, len(w), 1024)
        ]
    )
    return Factors(b, whole.A), (1 + g) * norms



