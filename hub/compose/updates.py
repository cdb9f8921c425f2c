"""Additive updates and gains: what acts on single modules that have a weight.

What is active is a state: for each module, what runs there. Adapters that only have low-rank
factors need nothing made at activation, so that switching is an assignment; a module's part of the
state is made when the first forward asks for it. For anything else it is made at activation, which
raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.bank import Banked
from adapterkit.hub.compose.banks import Banks
from adapterkit.hub.compose.blocks import Setup
from adapterkit.hub.compose.fixed import Room
from adapterkit.hub.compose.here import Current, lasting, recompile
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.patch import Patch, Runner
from adapterkit.hub.compose.plan import Plan, Weighted
from adapterkit.hub.compose.routes import Routes
from adapterkit.hub.compose.rows import Rows
from adapterkit.hub.compose.spots import owner_of
from adapterkit.hub.compose.weave import ByRows, Part, parts_of, whole_of
from adapterkit.hub.primitives import Additive, Gain, GatedLowRank, Primitive

HERE = Additive | Gain | GatedLowRank
# parameter of a module, "" for its weight -> what acts on it
ByParameter = Mapping[str, tuple[Primitive, ...]]


class State(Protocol):
    """ready: module -> what runs there, None for the base; made where it is missing."""

    ready: dict[str, Runner | None]

    def make(self, patch: Patch) -> Runner | None: ...


@dataclass(frozen=True)
class Own:
    """One adapter's updates by module. odd: modules where they are more than factors in a bank."""

    modules: Mapping[str, ByParameter]
    odd: frozenset[str]
    has_gains: bool

    @classmethod
    def of(cls, lowered: Lowered, modules: Mapping[str, nn.Module]) -> Own:
        found: dict[str, dict[str, tuple[Primitive, ...]]] = {}
        for row, primitives in lowered.updates.items():
            mine = tuple(p for p in primitives if isinstance(p, HERE))
            if mine:
                module, parameter = owner_of(modules, row)
                found.setdefault(module, {})[parameter] = mine
        odd = {
            module
            for module, made in found.items()
            if made.keys() != {""} or not all(isinstance(p, Banked) for p in made[""])
        }
        every = (p for made in found.values() for mine in made.values() for p in mine)
        return cls(found, frozenset(odd), any(isinstance(p, Gain) for p in every))


@dataclass(eq=False)
class Active:
    """What is active, and what of it was made ready."""

    setup: Setup
    own: Mapping[str, Own]
    sequential: bool
    ready: dict[str, Runner | None] = field(default_factory=dict)

    @lasting()
    def make(self, patch: Patch) -> Runner | None:
        found = self.folded(patch)
        runner = self.ready[patch.path] = found.runner if isinstance(found, Plan) else found
        return runner

    def is_odd(self, path: str) -> bool:
        return any(path in own.odd for own in self.own.values())

    def updates(self, path: str) -> list[Weighted]:
        """All that acts on the weight of a module."""
        own = ((w, self.own[n].modules.get(path, {}).get("", ())) for n, w in self.setup.items())
        return [Weighted(weight, primitive) for weight, made in own for primitive in made]

    def _by_parameter(self, path: str) -> dict[str, list[Part]]:
        found: dict[str, dict[str, list[Weighted]]] = {}
        for name, weight in self.setup.items():
            for parameter, made in self.own[name].modules.get(path, {}).items():
                found.setdefault(parameter, {})[name] = [Weighted(weight, p) for p in made]
        return {parameter: parts_of(self.setup, own) for parameter, own in found.items()}

    @property
    def _sums_gains(self) -> bool:
        """PEFT multiplies the gains it activates, and sums those it gives weights."""
        weighted = (n for n, weight in self.setup.items() if weight != 1)
        return self.sequential and any(self.own[name].has_gains for name in weighted)

    def folded(self, patch: Patch) -> Plan | ByRows | None:
        """All that is active on a module, as a whole."""
        updates = self._by_parameter(patch.path)
        if updates.keys() - {""}:
            whole = {parameter: whole_of(parts) for parameter, parts in updates.items()}
            return patch.fold_parameters(whole, self.sequential)
        rule = {"sequential": self.sequential, "sum_gains": self._sums_gains}
        plans = [(part.share, patch.fold(part.updates, **rule)) for part in updates.get("", ())]
        if len(plans) < 2:
            return plans[0][1] if plans else None
        return ByRows(tuple(plans))


class Updates:
    """Swapped forwards of the modules that any adapter has an update for, and their banks."""

    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._modules = dict(model.named_modules())
        self._sequential = options.dialect == "peft"
        self._patches: dict[str, Patch] = {}
        self._own: dict[int, tuple[Lowered, Own]] = {}
        self.banks = Banks(self._modules, options.slots or 1)
        self._room = Room(options.slots, options.max_rank) if options.max_rank else None
        self.current: Current[State | None] = Current(None)

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> Active | None:
        own = {name: self._of(lowered[name]) for name in active}
        self._install({path for each in own.values() for path in each.modules})
        if not any(each.modules for each in own.values()):
            return None
        state = Active(active, own, self._sequential)
        for path in self._eager(active, own):
            state.make(self._patches[path])
        return state

    def _install(self, paths: set[str]) -> None:
        missing = paths - self._patches.keys()
        for path in missing:
            self._patches[path] = Patch(path, self._modules[path], self.current)
        if missing:
            recompile()

    def _eager(self, active: Setup, own: Mapping[str, Own]) -> Iterable[str]:
        if active.is_composed:
            return {path for each in own.values() for path in each.modules}
        return {path for each in own.values() for path in each.odd}

    @property
    def is_fixed(self) -> bool:
        """Whether memory is reserved for compiled code."""
        return self._room is not None

    def pack(self) -> None:
        """Puts what is active where compiled code looks, if it does."""
        if self._room is not None:
            self._room.pack(self.current.now, self._patches, self.banks.of)

    def forget(self, lowered: Lowered) -> None:
        self._own.pop(id(lowered), None)

    def _of(self, lowered: Lowered) -> Own:
        """Kept by identity, so that no activation looks at every update again."""
        if id(lowered) not in self._own:
            self._own[id(lowered)] = lowered, Own.of(lowered, self._modules)
        return self._own[id(lowered)][1]

    def route(self, states: Sequence[Active | None], rows: Rows) -> Routes | None:
        if not any(states):
            return None
        return Routes(tuple(states), rows, self.banks.of)

    def remove(self) -> None:
        self.current.switch(None)
        for patch in reversed(self._patches.values()):
            patch.remove()
        self._patches.clear()
        self.banks.clear()
        self._own.clear()
