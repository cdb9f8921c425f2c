"""What an adapter does to one module without a model: the change of its weight, exact, as factors
where it has some, else by rows; and of its bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.hub.blend.factors import Factors
from adapterkit.hub.findings import clean
from adapterkit.hub.offline import Ground
from adapterkit.hub.primitives import (
    BiasShift,
    DenseDelta,
    InputGain,
    LowRank,
    OutputGain,
    Primitive,
    Replace,
    RowScale,
)
from adapterkit.registry.errors import InvalidError

# Why a primitive is no change of a weight or a bias, by the name of its class.
NO_CHANGE = {
    "InputRotation": "a rotation turns the input: W R - W has the rank of the weight, so that"
    " merging it into the base is what keeps it",
    "GatedLowRank": "a LoRA behind a gate counts as much as the gate says that looks at the input,"
    " which no weight does",
    "Bottleneck": "a bottleneck is a network with a nonlinearity, which no weight equals",
    "Coupling": "an invertible bottleneck couples halves of a hidden state by networks, which no"
    " weight equals",
    "Fusion": "a fusion weighs bottlenecks by attention to the input, which no weight equals",
    "PrefixKV": "a prefix adds keys and values that every token attends to, which no weight equals",
    "VirtualTokens": "a prompt adds tokens in front of the input, which no weight equals",
}


def reason(primitive: Primitive) -> str:
    """Why it is no change of a weight, as a clause."""
    return NO_CHANGE.get(type(primitive).__name__, "what it does is no change of a weight")


@dataclass(frozen=True, eq=False)
class Change:
    """factors: B A, float64. rest: further rows [start, stop) of the change, float64, where a part
    of it has no factors worth having. shift: of the bias (out), float64."""

    factors: Factors
    rest: Callable[[int, int], Tensor] | None = None
    shift: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors.shape

    def rows(self, start: int, stop: int) -> Tensor:
        found = self.factors.rows(start, stop)
        return found if self.rest is None else found + self.rest(start, stop)


def change_of(ground: Ground, name: str, made: Sequence[Primitive]) -> Change | None:
    """Of additive updates and diagonal gains; None where all that is made are replaced parts.

    Raises InvalidError naming what is no change of a weight, NeedsBaseError.
    """
    acting = [primitive for primitive in made if not isinstance(primitive, Replace)]
    if not acting:
        return None
    _refuse_others(ground, name, acting)
    row_scale = sum((p.g for p in acting if isinstance(p, RowScale)), start=torch.tensor(0.0))
    rho, columns = _gain(acting, OutputGain), _gain(acting, InputGain)
    rows = _product(rho, None if not row_scale.ndim else 1 + row_scale.double())
    lows = [p for p in acting if isinstance(p, LowRank)]
    if any(p.B.ndim != 2 for p in lows):
        raise InvalidError(
            f"{clean(ground.adapter.name)}: at {clean(name)}, the factors are those of a"
            " convolution or of many matrices, not of one matrix"
        )
    pairs = [_factors(p) for p in lows]
    if rho is not None or columns is not None:
        pairs = [Factors(_times(rho, f.B), _times(columns, f.A.T).T) for f in pairs]
    dense = [_scaled(p.D, rho, columns) for p in acting if isinstance(p, DenseDelta)]
    rests: list[Callable[[int, int], Tensor]] = [_rows_of(whole) for whole in dense]
    if rows is not None or columns is not None:
        part, rest = _scaled_weight(ground.weight(name), rows, columns)
        pairs += [part] if part is not None else []
        rests += [rest] if rest is not None else []
    shift = _shift(ground, name, made, rho)
    shape = _shape(pairs, dense, shift, ground, name, rows is not None or columns is not None)
    return Change(_joined(pairs, shape), _added(rests), shift)


def _refuse_others(ground: Ground, name: str, acting: Sequence[Primitive]) -> None:
    for primitive in acting:
        if not isinstance(
            primitive, LowRank | RowScale | BiasShift | DenseDelta | OutputGain | InputGain
        ):
            why = reason(primitive)
            raise InvalidError(f"{clean(ground.adapter.name)}: at {clean(name)}, {why}")


def _factors(p: LowRank) -> Factors:
    """The scales folded in: that of the product and of outputs into B, that of the rank into A."""
    b, a = p.B.double(), p.A.double()
    if p.out_scale is not None:
        b = b * p.out_scale.double()[:, None]
    if p.rank_scale is not None:
        a = a * p.rank_scale.double()[:, None]
    return Factors(b if p.scale == 1 else p.scale * b, a)


def _gain(acting: Sequence[Primitive], kind: type[OutputGain] | type[InputGain]) -> Tensor | None:
    found: Tensor | None = None
    for primitive in acting:
        if isinstance(primitive, kind):
            found = _product(found, primitive.l.double())
    return found


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a * b


def _times(gain: Tensor | None, rows: Tensor) -> Tensor:
    return rows if gain is None else gain[:, None] * rows


def _scaled(whole: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    found = _times(rows, whole.double())
    return found if columns is None else found * columns


def _rows_of(whole: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: whole[start:stop]


def _scaled_weight(
    w: Tensor, rows: Tensor | None, columns: Tensor | None
) -> tuple[Factors | None, Callable[[int, int], Tensor] | None]:
    """diag(rows) W diag(columns) - W: of as many rows or columns as are scaled, where they are few.

    w (out, in), rows (out), columns (in).
    """
    n_out, n_in = w.shape
    gain = rows if columns is None else columns
    if gain is not None and (rows is None or columns is None):
        scaled = (gain != 1).nonzero().flatten()
        if len(scaled) * (n_out + n_in) < n_out * n_in:
            change = (gain[scaled] - 1)[:, None]
            unit = torch.zeros(len(gain), len(scaled), dtype=torch.float64)
            unit[scaled, torch.arange(len(scaled))] = 1
            if columns is None:
                return Factors(unit, change * w[scaled].double()), None
            return Factors((change * w.T[scaled].double()).T, unit.T), None

    def rest(start: int, stop: int) -> Tensor:
        part = w[start:stop].double()
        return _scaled(part, None if rows is None else rows[start:stop], columns) - part

    return None, rest


def _shift(
    ground: Ground, name: str, made: Sequence[Primitive], rho: Tensor | None
) -> Tensor | None:
    """rho (b + sum d) - b, b being what the adapter replaces the base's bias with, if it does."""
    shifts = [p.d.double() for p in made if isinstance(p, BiasShift)]
    total = sum(shifts[1:], start=shifts[0]) if shifts else None
    if rho is None:
        return total
    replaced = [p.T for p in made if isinstance(p, Replace) and p.name == "bias"]
    bias = replaced[-1] if replaced else ground.bias(name)
    if bias is None:
        return None if total is None else rho * total
    scaled = (rho - 1) * bias.double()
    return scaled if total is None else scaled + rho * total


def _shape(
    pairs: Sequence[Factors], dense: Sequence[Tensor], shift: Tensor | None, ground: Ground,
    name: str, scales: bool,
) -> tuple[int, int]:  # fmt: skip
    if pairs:
        return pairs[0].shape
    if dense:
        return (dense[0].shape[0], dense[0].shape[1])
    if scales:
        weight = ground.weight(name)
        return (weight.shape[0], weight.shape[1])
    module = ground.module(name)  # a shift of a bias alone does not tell the inputs
    return module.n_out, module.n_in


def _joined(pairs: Sequence[Factors], shape: tuple[int, int]) -> Factors:
    if len(pairs) == 1:
        return pairs[0]
    b = [torch.zeros(shape[0], 0, dtype=torch.float64), *(f.B for f in pairs)]
    a = [torch.zeros(0, shape[1], dtype=torch.float64), *(f.A for f in pairs)]
    return Factors(torch.cat(b, dim=1), torch.cat(a))


def _added(
    rests: Sequence[Callable[[int, int], Tensor]],
) -> Callable[[int, int], Tensor] | None:
    if not rests:
        return None
    return lambda start, stop: torch.stack([rest(start, stop) for rest in rests]).sum(0)
