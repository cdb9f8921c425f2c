"""What is active on one module, folded once at activation; a forward has no loop over adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterkit.hub.compose import gated
from adapterkit.hub.compose.bank import Banked, covering
from adapterkit.hub.compose.gains import Gains
from adapterkit.hub.compose.gated import Gated
from adapterkit.hub.compose.products import along, dense, embed_scale, low_rank
from adapterkit.hub.primitives import (
    BiasShift,
    DenseDelta,
    Gain,
    GatedLowRank,
    LowRank,
    Primitive,
    Replace,
    RowScale,
)


@dataclass(frozen=True)
class Weighted:
    """One primitive of one adapter, with the weight the adapter is active at."""

    weight: float
    primitive: Primitive


@dataclass(frozen=True)
class Sums:
    """The additive updates of a module:
    y = y0 + g (y0 - b) + o expand(project(x, A) gate, B) + D x + gated(x) + d.

    A (R, in), gate (R), B (out, R), o, g and d (out), D (out, in); None where there is nothing.
    Of fused experts each has one more dimension in front, the gate only where ranks differ.
    """

    A: Tensor | None = None
    gate: Tensor | None = None
    B: Tensor | None = None
    o: Tensor | None = None
    g: Tensor | None = None
    d: Tensor | None = None
    D: Tensor | None = None
    gated: Gated | None = None

    @property
    def is_empty(self) -> bool:
        return all(held is None for held in vars(self).values())


def banked(updates: Sequence[Weighted]) -> list[tuple[float, Banked]]:
    """Those that are factors in a bank, with their weights."""
    return [(each.weight, each.primitive) for each in updates if isinstance(each.primitive, Banked)]


def fold(updates: Sequence[Weighted], *, sequential: bool = False) -> Sums:
    """The sum of all additive updates but Replace.

    sequential: PEFT's dialect, in which a row scale also multiplies what came before it
    (peft 0.21 `tuners/lora/variants.py`, DoraLinearVariant.forward).
    """
    factors: list[tuple[float, LowRank, Tensor | None]] = []
    shift: Tensor | None = None
    g: Tensor | None = None
    total: Tensor | None = None
    for weight, primitive in ((update.weight, update.primitive) for update in updates):
        if isinstance(primitive, LowRank):
            factors.append((weight, primitive, None))
        elif isinstance(primitive, BiasShift):
            shift = _add(shift, weight * primitive.d)
        elif isinstance(primitive, DenseDelta):
            total = _add(total, primitive.D if weight == 1 else weight * primitive.D)
        elif isinstance(primitive, RowScale):
            scaled = weight * primitive.g
            if sequential:
                factors, shift = _rescale(factors, 1 + scaled, shift)
                total = None if total is None else _rows_scaled(total, 1 + scaled)
                scaled = scaled if g is None else scaled * (1 + g)
            g = _add(g, scaled)
    return Sums(*_stack(factors), g, shift, total, gated.fold(_gated(updates)))


def _gated(updates: Sequence[Weighted]) -> list[tuple[float, GatedLowRank]]:
    return [(u.weight, u.primitive) for u in updates if isinstance(u.primitive, GatedLowRank)]


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _rescale(
    factors: list[tuple[float, LowRank, Tensor | None]], by: Tensor, shift: Tensor | None
) -> tuple[list[tuple[float, LowRank, Tensor | None]], Tensor | None]:
    """What earlier adapters added, scaled by rows. The adapter's own factors come just before its
    row scale and carry their scale already, so they are left as they are."""
    earlier = [
        (weight, low, by if extra is None else extra * by) for weight, low, extra in factors[:-1]
    ]
    return earlier + factors[-1:], None if shift is None else shift * by


def _stack(
    factors: list[tuple[float, LowRank, Tensor | None]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(A, gate, B, o) of all factors side by side; one adapter alone is used where it lies."""
    if not factors:
        return None, None, None, None
    if (window := _neighbours(factors)) is not None:
        return window
    gates = [_gate(weight, low) for weight, low, _ in factors]
    if len(factors) == 1:
        _, low, extra = factors[0]
        if low.rank_scale is None:
            return low.A, gates[0], _scaled_rows(low, extra), None
        return low.A, gates[0], low.B, _product(low.out_scale, extra)
    bs = [_scaled_rows(low, extra) for _, low, extra in factors]
    a = torch.cat([low.A for _, low, _ in factors], dim=-2)
    if any(gate.ndim == 2 for gate in gates):  # of experts, which may have ranks of their own
        gates = [gate.expand(len(a), -1) for gate in gates]
    return a, torch.cat(gates, dim=-1), torch.cat(bs, dim=-1), None


def _neighbours(
    factors: list[tuple[float, LowRank, Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor, None] | None:
    """Factors that lie beside each other in a bank, where they lie."""
    lows = [low for _, low, extra in factors if isinstance(low, Banked) and extra is None]
    if len(lows) < max(len(factors), 2) or (window := covering(lows)) is None:
        return None
    start, stop = window
    first = lows[0]
    gate = torch.zeros(stop - start, device=first.A.device)
    for (weight, _, _), low in zip(factors, lows, strict=True):
        gate[low.start - start : low.stop - start] += weight * low.scale
    a, b = (_window(view, first.start, window) for view in (first.A, first.B.mT))
    return a, gate, b.mT, None


def _window(view: Tensor, row: int, window: tuple[int, int]) -> Tensor:
    """Other rows of the matrix that `view` shows from `row` on."""
    width, (start, stop) = view.shape[1], window
    offset = view.storage_offset() + (start - row) * width
    return view.as_strided((stop - start, width), (width, 1), offset)


def _gate(weight: float, low: LowRank) -> Tensor:
    """float32: a scale is never rounded."""
    gate = torch.full(low.A.shape[-2:-1], weight * low.scale, device=low.A.device)
    return gate if low.rank_scale is None else gate * low.rank_scale.to(gate.dtype)


def _product(scale: Tensor | None, extra: Tensor | None) -> Tensor | None:
    return scale if extra is None else extra if scale is None else scale * extra


def _scaled_rows(low: LowRank, extra: Tensor | None) -> Tensor:
    b = low.B if low.out_scale is None else _rows_scaled(low.B, low.out_scale)
    return b if extra is None else _rows_scaled(b, extra)


def _rows_scaled(matrix: Tensor, by: Tensor) -> Tensor:
    return matrix * by[..., None].to(matrix.dtype)


@dataclass(frozen=True)
class Rows:
    """Rows of a table that are replaced: index (n) sorted, values (n, width)."""

    index: Tensor
    values: Tensor


@dataclass(frozen=True)
class Plan:
    """Everything active on one module.

    gains: around all the rest, which sees P x for x.
    shadow: the forward of a copy of the module that has other parameters for those replaced whole;
    dense: a replaced weight (out, in) of a quantized linear, whose class cannot hold it.
    """

    sums: Sums
    rows: Rows | None = None
    shadow: Callable[..., Any] | None = None
    dense: Tensor | None = None
    gains: Gains = Gains()

    @property
    def is_light(self) -> bool:
        """Whether it is nothing but factors and vectors."""
        sums, steps = self.sums, self.gains.steps
        whole = (sums.o, sums.D, sums.gated, self.rows, self.shadow, self.dense)
        return all(each is None for each in whole) and (
            not steps or (len(steps) == 1 and steps[0].ndim == 1)
        )

    @property
    def runner(self) -> Plan | Factors:
        """What does the same in the least time."""
        sums = self.sums
        only = not any(held is not None for name, held in vars(sums).items() if name not in FACTORS)
        if sums.A is None or sums.B is None or not (only and self.is_light and self.gains.is_empty):
            return self
        return Factors(sums.A, sums.gate, sums.B) if sums.A.ndim == 2 else self

    @property
    def _is_whole(self) -> bool:
        """Whether nothing is added to what the shadow computes."""
        return self.sums.is_empty and self.rows is None and self.gains.is_empty

    def run(self, module: Any, original: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The module's output with everything applied. The base's product is computed once, and a
        second time only where a row scale and a whole new weight meet."""
        if self.shadow is not None and self._is_whole:
            return self.shadow(*args, **kwargs)  # of any form, such as a router's three tensors
        x = args[0] if args else next(iter(kwargs.values()))
        if self.gains.steps:
            x = self.gains.enter(x)
            args, kwargs = ((x, *args[1:]), kwargs) if args else ((), with_first(kwargs, x))
        if self.shadow is not None:
            y = self.shadow(*args, **kwargs)
        elif self.dense is not None:
            bias = None if module.bias is None else module.bias.to(x.dtype)
            y = functional.linear(x, self.dense.to(x.dtype), bias)
        else:
            y = original(*args, **kwargs)
        replaced = self.shadow is not None or self.dense is not None
        base = original(*args, **kwargs) if replaced and self.sums.g is not None else y
        dtype = y.dtype
        if self.rows is not None:
            y = _with_rows(module, self.rows, x, y)
        y = with_sums(module, self.sums, x, y, base)
        return self.gains.leave(y).to(dtype)  # rounded once


FACTORS = ("A", "gate", "B")


@dataclass(frozen=True)
class Factors:
    """Low-rank factors and nothing else: what most adapters are, without a question asked."""

    A: Tensor
    gate: Tensor | None
    B: Tensor

    def run(self, module: Any, original: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        y: Tensor = original(*args, **kwargs)
        made = low_rank(module, x, self.A, self.gate, self.B)
        if getattr(original, "__func__", None) is nn.Linear.forward:
            return y.add_(made)  # its own product, which nobody else has yet; rounded once
        return (y + made).to(y.dtype)


def with_first(kwargs: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The keyword arguments with x for the first of them, the input."""
    return {**kwargs, next(iter(kwargs)): x}


def with_sums(module: nn.Module, sums: Sums, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
    if sums.g is not None:
        bias = getattr(module, "bias", None)
        product = base if bias is None else base - along(module, bias).to(base.dtype)
        y = y + product * along(module, sums.g.to(y.device))
    if sums.A is not None and sums.B is not None:
        product = low_rank(module, x, sums.A, sums.gate, sums.B)
        y = y + (product if sums.o is None else product * along(module, sums.o))
    if sums.D is not None:
        y = y + dense(module, x, sums.D)
    if sums.gated is not None:
        y = y + sums.gated.run(x)
    if sums.d is not None:
        y = y + along(module, sums.d)
    return y


def added(sums: Sums, weight: Tensor) -> Tensor:
    """What the sums add to a weight as a whole.  weight (..., out, in)."""
    total = torch.zeros_like(weight)
    if sums.g is not None:
        total += _rows_scaled(weight, sums.g)
    if sums.A is not None and sums.B is not None:
        a = sums.A if sums.gate is None else _rows_scaled(sums.A, sums.gate)
        product = sums.B.to(total.dtype) @ a.to(total.dtype)
        total += product if sums.o is None else _rows_scaled(product, sums.o)
    return total if sums.D is None else total + sums.D


def _with_rows(module: nn.Module, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
    if not isinstance(module, nn.Embedding):  # a head tied to the table: these are its outputs
        bias = getattr(module, "bias", None)
        part = None if bias is None else bias[rows.index].to(x.dtype)
        new = functional.linear(x, rows.values.to(x.dtype), part)
        return y.index_copy(-1, rows.index, new.to(y.dtype))
    place = torch.searchsorted(rows.index, x).clamp(max=len(rows.index) - 1)
    hit = rows.index[place] == x
    values = rows.values.to(y.dtype)
    if (scale := embed_scale(module)) is not None:
        values = values * scale.to(y.dtype)
    return torch.where(hit[..., None], values[place], y)


Replacement = tuple[float, Replace]


def split(
    updates: Sequence[Weighted],
) -> tuple[list[Weighted], list[Replacement], list[tuple[float, Gain]]]:
    """(updates that are summed, weights and updates that replace, weights and gains)."""
    summed: list[Weighted] = []
    replaced: list[Replacement] = []
    gains: list[tuple[float, Gain]] = []
    for update in updates:
        if isinstance(update.primitive, Replace):
            replaced.append((update.weight, update.primitive))
        elif isinstance(update.primitive, Gain):
            gains.append((update.weight, update.primitive))
        else:
            summed.append(update)
    return summed, replaced, gains
