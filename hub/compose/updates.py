"""Additive updates and gains: what acts on single modules that have a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Setup
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.patch import Patch
from adapterkit.hub.compose.plan import Plan, Weighted
from adapterkit.hub.compose.spots import owner_of
from adapterkit.hub.compose.weave import ByRows, Part, parts_of, whole_of
from adapterkit.hub.primitives import Additive, Gain, GatedLowRank

HERE = Additive | Gain | GatedLowRank


class Updates:
    """Swapped forwards of the modules that anything was ever active on."""

    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._modules = dict(model.named_modules())
        self._sequential = options.dialect == "peft"
        self._patches: dict[str, Patch] = {}

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> Callable[[], None]:
        own: dict[str, dict[str, list[Weighted]]] = {}
        for name, weight in active.items():
            for row, primitives in lowered[name].updates.items():
                mine = [Weighted(weight, p) for p in primitives if isinstance(p, HERE)]
                if mine:
                    own.setdefault(row, {})[name] = mine
        updates: dict[str, dict[str, list[Part]]] = {}
        for row, by_name in own.items():
            module, parameter = owner_of(self._modules, row)
            updates.setdefault(module, {})[parameter] = parts_of(active, by_name)
        for module in updates.keys() - self._patches.keys():
            self._patches[module] = Patch(self._modules[module])
        sum_gains = self._sequential and _has_weighted_gains(own.values())
        plans = {
            module: self._fold(patch, updates.get(module, {}), sum_gains)
            for module, patch in self._patches.items()
        }
        return lambda: self._switch(plans)

    def _fold(
        self, patch: Patch, updates: Mapping[str, Sequence[Part]], sum_gains: bool
    ) -> Plan | ByRows | None:
        if updates.keys() - {""}:
            whole = {parameter: whole_of(parts) for parameter, parts in updates.items()}
            return patch.fold_parameters(whole, self._sequential)
        plans = [
            (part.share, patch.fold(part.updates, sequential=self._sequential, sum_gains=sum_gains))
            for part in updates.get("", ())
        ]
        if len(plans) < 2:
            return plans[0][1] if plans else None
        return ByRows(tuple(plans))

    def _switch(self, plans: Mapping[str, Plan | ByRows | None]) -> None:
        for module, plan in plans.items():
            self._patches[module].plan = plan

    def remove(self) -> None:
        for patch in reversed(self._patches.values()):
            patch.remove()
        self._patches.clear()


def _has_weighted_gains(updates: Iterable[Mapping[str, Sequence[Weighted]]]) -> bool:
    """PEFT multiplies the gains it activates, and sums those it gives weights."""
    return any(
        update.weight != 1 and isinstance(update.primitive, Gain)
        for by_name in updates
        for made in by_name.values()
        for update in made
    )
