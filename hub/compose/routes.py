"""Updates of single modules by rows of the batch: work follows what the batch uses.

Factors that lie in the bank of a module take two products for all rows, whatever the number of
adapters: with those of every adapter in use side by side and a gate for each row, or, where every
row of a longer input has one adapter, as a batched product or a grouped one. Row scales, biases and
diagonal gains are gathered by row. What is none of these runs once for each mix, on its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.hub.compose import grouped
from adapterkit.hub.compose.bank import Bank, Banked, covering
from adapterkit.hub.compose.grouped import Spans
from adapterkit.hub.compose.here import lasting
from adapterkit.hub.compose.patch import Patch, Runner
from adapterkit.hub.compose.plan import Plan, Weighted, banked, with_first
from adapterkit.hub.compose.products import CONVS, expand, is_product, project
from adapterkit.hub.compose.rows import Layout, Rows
from adapterkit.registry.errors import InvalidError


@dataclass(eq=False)
class Routes:
    """mixes: what each row can have. gates: those of modules whose banks are laid out alike."""

    mixes: Sequence[Any]
    rows: Rows
    banks: Mapping[str, Bank]
    ready: dict[str, Runner | None] = field(default_factory=dict)
    gates: dict[tuple[Any, ...], Gates] = field(default_factory=dict)

    @lasting()
    def make(self, patch: Patch) -> Runner | None:
        runner = self.ready[patch.path] = self._made(patch)
        return runner

    def _made(self, patch: Patch) -> Runner | None:
        path = patch.path
        updates = [[] if mix is None else mix.updates(path) for mix in self.mixes]
        is_odd = any(mix is not None and mix.is_odd(path) for mix in self.mixes)
        takes_rows = is_product(patch.module) and not isinstance(patch.module, CONVS)
        if takes_rows and not is_odd:
            return self._factors(path, updates, patch) if any(updates) else None
        plans = [None if mix is None else mix.folded(patch) for mix in self.mixes]
        if all(plan is None for plan in plans):
            return None
        both = zip(plans, updates, strict=True)
        if takes_rows and all(_is_vectorial(plan, made) for plan, made in both):
            factors = self._factors(path, updates, patch)
            return ByVectors(path, self.rows, factors, _vectors(plans))
        return ByMix(path, self.rows, tuple(plans))

    def _factors(
        self, path: str, updates: Sequence[Sequence[Weighted]], patch: Patch
    ) -> ByGates | None:
        lows = [banked(made) for made in updates]
        spans: Spans = tuple(
            tuple((low.start, low.stop, weight * low.scale) for weight, low in made)
            for made in lows
        )
        if not any(spans):
            return None
        bank = self.banks[path]
        key = (spans, len(bank.a), bank.a.dtype, bank.a.device)
        if key not in self.gates:
            found = {low.start: low for made in lows for _, low in made}
            self.gates[key] = Gates(spans, covering(list(found.values())), bank.a.device, self.rows)
        gates = self.gates[key]
        a, b = gates.held(bank)
        one = gates.slots
        return ByGates(path, gates, a, b, one is not None and grouped.pays(a, b, one.rank))


class Gates:
    """Gates (mixes, R) over the rows of a bank that are in use. window: of the bank, None if they
    have to be gathered."""

    def __init__(
        self, spans: Spans, window: tuple[int, int] | None, device: torch.device, rows: Rows
    ) -> None:
        self.spans, self.rows = spans, rows
        every = sorted({(start, stop) for made in spans for start, stop, _ in made})
        self._window = window
        self._index: Tensor | None = None
        place: dict[int, int] = {}
        width = 0
        if window is None:
            for start, stop in every:
                place[start] = width
                width += stop - start
            ranges = [torch.arange(start, stop) for start, stop in every]
            self._index = torch.cat(ranges).to(device)
        else:
            place = {start: start - window[0] for start, _ in every}
            width = window[1] - window[0]
        gates = torch.zeros(len(spans), width)
        for mix, made in enumerate(spans):
            for start, stop, scale in made:
                gates[mix, place[start] : place[start] + stop - start] += scale
        self.gates = gates.to(device)
        self.slots = grouped.slots_of(spans, place, width, device)
        self._spread: dict[Layout, Tensor] = {}
        self._order: dict[Layout, Order | None] = {}
        self._groups: dict[Layout, grouped.Groups | None] = {}

    def held(self, bank: Bank) -> tuple[Tensor, Tensor]:
        """(A (R, in), B transposed (R, out)) of what is in use."""
        if self._index is not None:
            return bank.a[self._index], bank.b[self._index]
        start, stop = self._window or (0, 0)
        return bank.a[start:stop], bank.b[start:stop]

    def spread(self, layout: Layout, device: torch.device) -> Tensor:
        """(rows, R)"""
        if layout not in self._spread:
            with lasting():
                self._spread[layout] = self.gates[self.rows.index(layout, device)]
        return self._spread[layout]

    def order(self, layout: Layout, device: torch.device) -> Order | None:
        """Rows in the order of the slots, where each slot has as many of them as the others; None
        where a batched product is not of use."""
        if layout not in self._order:
            self._order[layout] = self._ordered(layout, device)
        return self._order[layout]

    def _ordered(self, layout: Layout, device: torch.device) -> Order | None:
        if self.slots is None:
            return None
        slots = self._slots_of(self.slots, layout)
        counts = {slots.count(slot) for slot in range(self.slots.count)}
        if None in slots or len(counts) > 1:
            return None
        there = sorted(range(len(slots)), key=lambda row: slots[row] or 0)
        if there == list(range(len(slots))):
            return Order()
        with lasting():
            order = torch.tensor(there, device=device)
            return Order(order, order.argsort())

    def groups(self, layout: Layout) -> grouped.Groups | None:
        """Rows that have an adapter, by slots; None where no row has one, or one has several."""
        if layout not in self._groups:
            one = self.slots
            self._groups[layout] = (
                None if one is None else grouped.Groups.of(self._slots_of(one, layout), one.scales)
            )
        return self._groups[layout]

    def _slots_of(self, slots: grouped.Slots, layout: Layout) -> list[int | None]:
        """Of each row."""
        return [slots.places[mix] for mix in self.rows.spread(layout)]


@dataclass(frozen=True)
class Order:
    """Rows in the order of their slots, and back; None where they are in it already."""

    there: Tensor | None = None
    back: Tensor | None = None


@dataclass(frozen=True)
class ByGates:
    """y + B ((A x) gate), a gate for each row.  A (R, in), B (R, out).  groups: whether a grouped
    product pays for long inputs."""

    path: str
    gates: Gates
    A: Tensor
    B: Tensor
    groups: bool = False

    def run(self, module: Any, original: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        y = original(*args, **kwargs)
        return self.added(module, x, y).to(y.dtype)

    def added(self, module: Any, x: Tensor, y: Tensor) -> Tensor:
        layout = self.gates.rows.within(x.shape, self.path)
        if x.ndim == 3 and layout.tokens == 1:
            order = self.gates.order(layout, x.device)
            if order is not None:
                return self._batched(x, y, order)
        if self.groups and y.numel() >= grouped.TOKENS * y.shape[-1]:
            groups = self.gates.groups(layout)
            if groups is not None and not isinstance(module, nn.Embedding):
                return groups.added(x, y, *self._by_slot())
        z = project(module, x, self.A)
        gate = self.gates.spread(layout, x.device)
        z.mul_(gate.view(len(gate), *(1,) * (z.ndim - 2), -1))
        return y + expand(module, z, self.B.mT)

    def _by_slot(self) -> tuple[Tensor, Tensor]:
        """A (slots, r, in), B (slots, r, out)"""
        rank = len(self.A) if self.gates.slots is None else self.gates.slots.rank
        return self.A.view(-1, rank, self.A.shape[-1]), self.B.view(-1, rank, self.B.shape[-1])

    def _batched(self, x: Tensor, y: Tensor, order: Order) -> Tensor:
        slots = self.gates.slots
        if slots is None:
            raise InvalidError(f"{self.path} has no slots of one rank")
        a, b = self._by_slot()
        if order.there is not None:
            x, y = x[order.there], y[order.there]
        z = torch.bmm(x.to(a.dtype).reshape(slots.count, -1, x.shape[-1]), a.mT)
        z.mul_(slots.scales)
        start = y.reshape(slots.count, -1, y.shape[-1])
        same = start.dtype == b.dtype
        made = torch.baddbmm(start, z, b) if same else start + torch.bmm(z, b)
        total = made.view(y.shape)
        return total if order.back is None else total[order.back]


@dataclass(frozen=True)
class Vectors:
    """Of each mix: row scales less 1, shifts and output gains (mixes, out), input gains (mixes,
    in); None where no mix has any."""

    g: Tensor | None
    d: Tensor | None
    rho: Tensor | None
    pin: Tensor | None


@dataclass(frozen=True)
class ByVectors:
    """rho * (y0 + g (y0 - b) + factors + d) of P x, each of them by rows."""

    path: str
    rows: Rows
    factors: ByGates | None
    vectors: Vectors

    def run(self, module: Any, original: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        layout = self.rows.within(x.shape, self.path)
        index = self.rows.index(layout, x.device)
        vectors = self.vectors
        if vectors.pin is not None:
            x = (x * _by_row(vectors.pin, index, x)).to(x.dtype)
            args, kwargs = ((x, *args[1:]), kwargs) if args else ((), with_first(kwargs, x))
        y0 = y = original(*args, **kwargs)
        if vectors.g is not None:
            bias = getattr(module, "bias", None)
            product = y0 if bias is None else y0 - bias.to(y0.dtype)
            y = y + product * _by_row(vectors.g, index, y0)
        if self.factors is not None:
            y = self.factors.added(module, x, y)
        if vectors.d is not None:
            y = y + _by_row(vectors.d, index, y0)
        if vectors.rho is not None:
            y = y * _by_row(vectors.rho, index, y0)
        return y.to(y0.dtype)


def _by_row(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return values[index].view(len(index), *(1,) * (like.ndim - 2), -1)


def _is_vectorial(plan: Plan | None, updates: Sequence[Weighted]) -> bool:
    """Whether it is no more than banked factors and vectors."""
    if plan is None:
        return True
    if not isinstance(plan, Plan) or not plan.is_light:
        return False
    low = [u.primitive for u in updates if hasattr(u.primitive, "A")]
    return all(isinstance(each, Banked) for each in low)


def _vectors(plans: Sequence[Plan | None]) -> Vectors:
    def stacked(read: Callable[[Plan], Tensor | None], neutral: float) -> Tensor | None:
        found = [None if plan is None else read(plan) for plan in plans]
        first = next((each for each in found if each is not None), None)
        if first is None:
            return None
        start = torch.full_like(first, neutral)
        return torch.stack([start if each is None else each for each in found])

    return Vectors(
        g=stacked(lambda plan: plan.sums.g, 0.0),
        d=stacked(lambda plan: plan.sums.d, 0.0),
        rho=stacked(lambda plan: plan.gains.rho, 1.0),
        pin=stacked(lambda plan: plan.gains.steps[0] if plan.gains.steps else None, 1.0),
    )


@dataclass(frozen=True)
class ByMix:
    """What each mix has for the module, on the rows that have it; None is the base."""

    path: str
    rows: Rows
    plans: tuple[Runner | None, ...]

    def run(self, module: Any, original: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        layout = self.rows.within(x.shape, self.path)
        pieces, places = [], []
        for mix, index in self.rows.members(layout, x.device):
            plan = self.plans[mix]
            mine = tuple(_rows_of(each, index, len(x)) for each in args)
            named = {name: _rows_of(each, index, len(x)) for name, each in kwargs.items()}
            made = (
                original(*mine, **named)
                if plan is None
                else plan.run(module, original, mine, named)
            )
            pieces.append(made)
            places.append(index)
        back = torch.cat(places).argsort()
        if not isinstance(pieces[0], tuple):
            return torch.cat(pieces)[back]
        return tuple(torch.cat(each)[back] for each in zip(*pieces, strict=True))


def _rows_of(value: Any, index: Tensor, count: int) -> Any:
    """The same rows of whatever has one for each of the input."""
    return value[index] if isinstance(value, Tensor) and len(value) == count else value
