"""What stands in front of the rows of a batch: folded once, at activation.

A row has one of several mixes, which is the only one unless rows are routed. What they hold is
padded in front to the longest: padding that every real position is kept from seeing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from adapterkit.hub.compose.caches import Held
from adapterkit.hub.compose.here import lasting
from adapterkit.hub.compose.rows import Rows


@dataclass(frozen=True, eq=False)
class Mix:
    """What one row has. n_keys: in front of each attention that generates; n_shifting: those behind
    which real tokens stand. front (n, width) before the embedded tokens, flagged (n, width) instead
    of some; embedded: rows, and whether they stand behind the first token."""

    n_keys: int = 0
    n_shifting: int = 0
    front: Tensor | None = None
    flagged: Tensor | None = None
    embedded: tuple[tuple[Tensor, bool], ...] = ()

    @property
    def n_front(self) -> int:
        return 0 if self.front is None else len(self.front)

    @property
    def n_flagged(self) -> int:
        return 0 if self.flagged is None else len(self.flagged)

    @property
    def n_embedded(self) -> int:
        return sum(len(rows) for rows, _ in self.embedded)

    @property
    def n_rows(self) -> int:
        """That became positions."""
        return self.n_front + self.n_embedded

    @property
    def shift(self) -> int:
        """Positions in front of the first real one."""
        return self.n_shifting + self.n_front

    def seats(self, length: int) -> list[int]:
        """Where the real tokens stand among all rows."""
        if not self.embedded:
            return list(range(self.n_front, self.n_front + length))
        order = [-1] * self.n_front + list(range(length))
        for rows, behind_first in self.embedded:
            start = int(behind_first)
            order[start:start] = [-1] * len(rows)
        return [seat for seat, token in enumerate(order) if token >= 0]


@dataclass(frozen=True, eq=False)
class Gate:
    """Where in the prefix of one layer a gated part [start, stop) lies, and what scales it; mix: of
    the rows that have it."""

    part: Held
    start: int
    stop: int
    weight: Tensor
    bias: Tensor
    mix: int = 0


@dataclass(frozen=True, eq=False)
class Attended:
    """An attention with keys in front. counts: of each mix; layer: its own in a cache; cross: of a
    decoder to its encoder."""

    held: Held
    counts: tuple[int, ...]
    gates: tuple[Gate, ...]
    layer: int
    cross: bool

    @property
    def n(self) -> int:
        return max(self.counts)

    @cached_property
    def seen(self) -> Tensor:
        """(mixes, n): which keys are no padding."""
        return _last(self.counts)


@dataclass(frozen=True, eq=False)
class Standing:
    """activation: a number of its own. own: attentions that generate, by path; sides: those of an
    encoder beside a decoder, or of the decoder to it."""

    activation: int
    mixes: tuple[Mix, ...]
    rows: Rows | None = None
    own: Mapping[str, Attended] = field(default_factory=dict)
    sides: Mapping[str, Attended] = field(default_factory=dict)

    @cached_property
    def n_keys(self) -> int:
        return max(mix.n_keys for mix in self.mixes)

    @cached_property
    def n_front(self) -> int:
        return max(mix.n_front for mix in self.mixes)

    @cached_property
    def n_rows(self) -> int:
        return max(mix.n_rows for mix in self.mixes)

    @cached_property
    def n_flagged(self) -> int:
        return max(mix.n_flagged for mix in self.mixes)

    @property
    def has_embedded(self) -> bool:
        return any(mix.embedded for mix in self.mixes)

    @property
    def shift(self) -> int:
        return max(mix.shift for mix in self.mixes)

    @property
    def held(self) -> int:
        """What the cache and the mask have more than real tokens."""
        return self.n_keys + self.n_rows

    @cached_property
    def is_padded(self) -> bool:
        """Whether some rows have fewer positions in front than others."""
        return any(mix.n_rows < self.n_rows for mix in self.mixes)

    @cached_property
    def is_moved(self) -> bool:
        """Whether real tokens stand elsewhere than behind all that the cache holds."""
        return any(mix.shift != self.held for mix in self.mixes)

    @cached_property
    def has_gap(self) -> bool:
        """Whether padding stands between the keys of a row and its tokens."""
        return any(mix.n_keys and mix.n_rows < self.n_rows for mix in self.mixes)

    @cached_property
    def seen(self) -> Tensor:
        """(mixes, held): what is no padding."""
        keys = _last([mix.n_keys for mix in self.mixes])
        return torch.cat([keys, _last([mix.n_rows for mix in self.mixes])], dim=1)

    @cached_property
    def front(self) -> Tensor:
        """(mixes, n_front, width)"""
        fronts = [mix.front for mix in self.mixes]
        like = next(front for front in fronts if front is not None)
        with lasting():
            table = like.new_zeros(len(fronts), self.n_front, like.shape[1])
            for number, front in enumerate(fronts):
                if front is not None:
                    table[number, self.n_front - len(front) :] = front
        return table

    @cached_property
    def flagged(self) -> Tensor:
        """(mixes, n_flagged, width), of which a mix has the first ones."""
        found = [mix.flagged for mix in self.mixes]
        like = next(rows for rows in found if rows is not None)
        with lasting():
            table = like.new_zeros(len(found), self.n_flagged, like.shape[1])
            for number, rows in enumerate(found):
                if rows is not None:
                    table[number, : len(rows)] = rows
        return table

    def numbers(self, read: Callable[[Mix], int]) -> Tensor:
        """(mixes): one of each."""
        return torch.tensor([read(mix) for mix in self.mixes])

    def seats(self, length: int, *, padded: bool) -> Tensor:
        """(mixes, length): where real tokens stand, padded in front or not."""
        found = torch.tensor([mix.seats(length) for mix in self.mixes])
        return found + self.pads[:, None] if padded else found

    @cached_property
    def pads(self) -> Tensor:
        """(mixes): positions that each has fewer than the longest."""
        return self.numbers(lambda mix: self.n_rows - mix.n_rows)

    def index(self, batch: int, device: torch.device) -> Tensor:
        """(batch), or (1) for all: the mix of each row. Raises InvalidError for a batch that is not
        the routed one."""
        if self.rows is None:
            return torch.zeros(1, dtype=torch.long, device=device)
        return self.rows.index(self.rows.within(torch.Size((batch,)), "the model"), device)

    def spread(self, values: Tensor, batch: int, device: torch.device | None = None) -> Tensor:
        """values (mixes, ...) of each row, (batch, ...); or (1, ...) for all."""
        values = values if device is None else values.to(device)
        return values if self.rows is None else values[self.index(batch, values.device)]

    def parts(self, batch: int, device: torch.device) -> Iterator[tuple[Mix, Tensor | slice]]:
        """Each mix, and which rows have it."""
        if self.rows is None:
            yield self.mixes[0], slice(None)
            return
        layout = self.rows.within(torch.Size((batch,)), "the model")
        for number, rows in self.rows.members(layout, device):
            yield self.mixes[number], rows

    def prefixes(self, batch: int) -> dict[int, Held]:
        """By rows: layer of the cache -> keys and values."""
        return {one.layer: self.of_rows(one.held, batch) for one in self.own.values()}

    def of_rows(self, held: Held, batch: int) -> Held:
        return Held(self.spread(held.k, batch), self.spread(held.v, batch))

    def chosen(self, values: Sequence[int], make: Callable[[int], Tensor]) -> Tensor:
        """What is made with the value of its mix, (rows, ...) or (1, ...), for each row."""
        made = {value: make(value) for value in set(values)}
        if self.rows is None or len(made) == 1:
            return made[values[0]]
        batch = self.rows.batch.rows
        every = torch.stack([made[v].expand(batch, *made[v].shape[1:]) for v in values])
        return every[self.index(batch, every.device), torch.arange(batch, device=every.device)]

    @contextmanager
    def noted(self, extra: int, ends: Tensor | None = None) -> Iterator[None]:
        """While modules see so many more tokens of each row than the caller gave; ends: how many of
        them are padding at its end."""
        if self.rows is None:
            yield
            return
        batch = self.rows.batch
        before = batch.extra, batch.held, batch.ends
        batch.extra, batch.held, batch.ends = extra, self.held, ends
        try:
            yield
        finally:
            batch.extra, batch.held, batch.ends = before


def _last(counts: Sequence[int]) -> Tensor:
    """(mixes, most): the last of each so many are true."""
    most = max(counts)
    return torch.arange(most) >= most - torch.tensor(counts)[:, None]
