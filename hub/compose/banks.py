"""The banks of a model: a place for each adapter's factors, in every module it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from adapterkit.hub.compose.bank import Bank, Banked, is_bankable
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.products import is_product
from adapterkit.hub.primitives import LowRank, Primitive


class Banks:
    """of: module -> its bank. slots: adapters that memory is reserved for."""

    def __init__(self, modules: Mapping[str, nn.Module], slots: int) -> None:
        self.of: dict[str, Bank] = {}
        self._modules, self._slots = modules, slots

    def reserve(self, slots: int) -> None:
        """For banks that are not there yet."""
        self._slots = max(slots, 1)

    def clear(self) -> None:
        self.of.clear()

    def keep(self, lowered: Lowered) -> tuple[Lowered, bool]:
        """The same with its factors in the banks. (it, whether those of others were moved)"""
        moved = False
        updates: dict[str, tuple[Primitive, ...]] = {}
        for row, primitives in lowered.updates.items():
            made: list[Primitive] = []
            for primitive in primitives:
                if isinstance(primitive, LowRank) and self._is_banked(row, primitive):
                    primitive, grew = self._bank(row, primitive).put(primitive)
                    moved |= grew
                made.append(primitive)
            updates[row] = tuple(made)
        return replace(lowered, updates=updates), moved

    def moved(self, lowered: Lowered) -> Lowered:
        """The same, looking at where its factors lie now."""
        return replace(
            lowered,
            updates={
                row: tuple(
                    self.of[row].at(p, p.start) if isinstance(p, Banked) else p for p in made
                )
                for row, made in lowered.updates.items()
            },
        )

    def free(self, lowered: Lowered) -> None:
        for row, made in lowered.updates.items():
            for primitive in made:
                if isinstance(primitive, Banked):
                    self.of[row].free(primitive)

    def _is_banked(self, row: str, low: LowRank) -> bool:
        module = self._modules.get(row)
        if module is None or not is_product(module) or not is_bankable(low):
            return False
        return row not in self.of or self.of[row].takes(low)

    def _bank(self, row: str, low: LowRank) -> Bank:
        if row not in self.of:
            self.of[row] = Bank(low, self._slots * len(low.A))
        return self.of[row]
