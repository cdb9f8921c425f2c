"""Everything that acts on one live model: its parts, and what they are switched to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Setup
from adapterkit.hub.compose.context import Context
from adapterkit.hub.compose.entry import Entry
from adapterkit.hub.compose.heads import Heads
from adapterkit.hub.compose.here import Turn
from adapterkit.hub.compose.interventions import Interventions
from adapterkit.hub.compose.layers import Layers
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.parts import Make, Part
from adapterkit.hub.compose.possible import require_no_means
from adapterkit.hub.compose.rows import Recorder, Rows
from adapterkit.hub.compose.updates import Updates
from adapterkit.hub.primitives import (
    Bottleneck,
    Coupling,
    FirstToken,
    Head,
    Intervention,
    PrefixKV,
    Primitive,
    VirtualTokens,
)

# One for each class of primitives, from the outside in; Updates, the last, has the banks. What an
# adapter has to hold to concern it (nothing: it is asked always), and its state while none does.
PARTS: tuple[tuple[Make, tuple[type[Primitive], ...], Any], ...] = (
    (Context, (PrefixKV, VirtualTokens), None),
    (Entry, (), None),
    (Heads, (Head, FirstToken), {}),
    (Interventions, (Intervention,), {}),
    (Layers, (Bottleneck, Coupling), {}),
)
# What is kept ready to be switched to again: setups of one adapter only point into the banks, those
# of several may hold copies of factors side by side, as routes may.
LIGHT, HEAVY = 256, 2


@dataclass(frozen=True, eq=False)
class Ready:
    """A setup, or rows that have several, and the state of each part that makes it so."""

    setups: tuple[Setup, ...]
    given: Setup
    states: tuple[Any, ...]

    @property
    def names(self) -> set[str]:
        return {name for setup in self.setups for name in setup}


class Engine:
    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self.updates = Updates(model, base, options)
        made = [(make(model, base, options), classes, idle) for make, classes, idle in PARTS]
        self._asked: list[tuple[Part, tuple[type[Primitive], ...], Any]] = made
        self._asked.append((self.updates, (), None))
        self._parts = [part for part, _, _ in self._asked]
        self._recorder = Recorder(model)
        self._turn = Turn()
        self._light: OrderedDict[Any, Ready] = OrderedDict()
        self._heavy: OrderedDict[Any, Ready] = OrderedDict()

    def found(self, key: Any) -> Ready | None:
        """What was made ready for a key before, if nothing changed since."""
        for held in (self._light, self._heavy):
            if key in held:
                held.move_to_end(key)
                return held[key]
        return None

    def hold(self, key: Any, ready: Ready) -> None:
        is_light = len(ready.names) < 2
        held, most = (self._light, LIGHT) if is_light else (self._heavy, HEAVY)
        held[key] = ready
        if len(held) > most:
            held.popitem(last=False)

    def forget(self) -> None:
        """For when factors lie elsewhere, or mean something else."""
        self._light.clear()
        self._heavy.clear()

    def free(self, lowered: Lowered) -> None:
        """Its place in the banks is for others."""
        self.updates.forget(lowered)
        self.updates.banks.free(lowered)

    def ready(self, active: Setup, given: Setup, lowered: Mapping[str, Lowered]) -> Ready:
        """Raises if a part cannot be so; then nothing has changed."""
        return Ready((active,), given, self._states(active, lowered))

    def _states(self, active: Setup, lowered: Mapping[str, Lowered]) -> tuple[Any, ...]:
        held = {each for name in active for each in lowered[name].classes}
        return tuple(
            part.plan(active, lowered) if not classes or not held.isdisjoint(classes) else idle
            for part, classes, idle in self._asked
        )

    def switch(self, ready: Ready) -> None:
        for part, state in zip(self._parts, ready.states, strict=True):
            part.current.switch(state)
        self.updates.pack()

    def by_rows(
        self, setups: Sequence[Setup], of: Sequence[int], lowered: Mapping[str, Lowered]
    ) -> Ready:
        """Rows of the batch that have one of these setups each."""
        self._recorder.install()
        rows = Rows(tuple(of), self._recorder.batch)
        mixes = zip(*(self._states(setup, lowered) for setup in setups), strict=True)
        routed = zip(self._parts, mixes, strict=True)
        states = tuple(part.route(states, rows) for part, states in routed)
        require_no_means([setups[mix] for mix in sorted(rows.padded)], lowered)
        return Ready(tuple(setups), Setup({}), states)

    @contextmanager
    def bound(self, ready: Ready) -> Iterator[None]:
        """This thread's own state for a while."""
        with self._turn if self.updates.is_fixed else nullcontext():
            pairs = zip(self._parts, ready.states, strict=True)
            before = [part.current.bind(state) for part, state in pairs]
            try:
                self.updates.pack()
                yield
            finally:
                for part, state in zip(self._parts, before, strict=True):
                    part.current.bind(state)
                self.updates.pack()

    def remove(self) -> None:
        self.forget()
        for part in reversed(self._parts):
            part.remove()
        self._recorder.remove()


def key_of(weights: Any) -> Any:
    """What tells weights, or those of rows, from others at once; None where they have to be looked
    at. Types count: True is no weight."""
    if type(weights) is dict:
        values = weights.values()
        return *weights.items(), *map(type, values)
    if type(weights) is list:
        return tuple([key_of(each) if type(each) is dict else each for each in weights])
    return None
