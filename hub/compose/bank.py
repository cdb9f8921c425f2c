"""The factors of all adapters on one module, side by side in memory of a size reserved before.

Each adapter's take a span of rows: of A (rows, in), and of B transposed, (rows, out). So one
adapter is a slice, any neighbours are one slice too, and reading either needs no copy. Scales are
never multiplied in; they stay in gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from adapterkit.hub.primitives import LowRank


@dataclass(frozen=True, eq=False)
class Banked(LowRank):
    """Low-rank factors that are views of rows [start, stop) of a bank."""

    start: int = 0
    stop: int = 0


class Bank:
    """a (rows, in), b (rows, out). Rows in front of the last that was ever taken hold factors, if
    only of an adapter that is gone; what is behind them holds anything, and is never looked at."""

    def __init__(self, like: LowRank, rows: int) -> None:
        self.a = like.A.new_empty(rows, like.A.shape[1])
        self.b = like.B.new_empty(rows, like.B.shape[0])
        self._spans: list[tuple[int, int]] = []

    @property
    def used(self) -> int:
        return sum(stop - start for start, stop in self._spans)

    def takes(self, low: LowRank) -> bool:
        """Whether factors can lie here: those of experts, of other dtypes, and those that other
        modules share, cannot."""
        return low.A.dtype == self.a.dtype and low.A.device == self.a.device

    def put(self, low: LowRank) -> tuple[Banked, bool]:
        """Copies factors into the first gap that is wide enough. (their views, whether everything
        had to be moved to a larger place: the views of all others are then to be made anew)"""
        rank = len(low.A)
        start = self._gap(rank)
        grows = start + rank > len(self.a)
        if grows:
            self._grow(max(2 * len(self.a), start + rank))
        self._spans = sorted([*self._spans, (start, start + rank)])
        self.a[start : start + rank].copy_(low.A)
        self.b[start : start + rank].copy_(low.B.mT)
        return self.at(low, start), grows

    def at(self, low: LowRank, start: int) -> Banked:
        """Views of what lies at a row already, with the scale of `low`."""
        stop = start + len(low.A)
        return Banked(self.b[start:stop].mT, self.a[start:stop], low.scale, start=start, stop=stop)

    def free(self, low: Banked) -> None:
        self._spans.remove((low.start, low.stop))

    def _gap(self, rank: int) -> int:
        """The first row of one; behind all if there is none."""
        edges = [(0, 0), *self._spans]
        for (_, stop), (start, _) in pairwise(edges):
            if start - stop >= rank:
                return stop
        return edges[-1][1]

    def _grow(self, rows: int) -> None:
        for name in ("a", "b"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(rows, old.shape[1])
            new[: len(old)] = old
            setattr(self, name, new)


def is_bankable(low: LowRank) -> bool:
    return low.A.ndim == 2 and low.rank_scale is None and low.out_scale is None


def covering(lows: Sequence[Banked]) -> tuple[int, int] | None:
    """The rows from the first to the last of them, where they hold not much else.

    Half precision may overflow in what is not active, and a gate of 0 does not undo that."""
    start, stop = min(low.start for low in lows), max(low.stop for low in lows)
    used = sum(low.stop - low.start for low in lows)
    wide = stop - start > 2 * used or lows[0].A.dtype == torch.float16
    return None if wide and stop - start > used else (start, stop)
