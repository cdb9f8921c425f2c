"""Layer updates: small networks at places of layers, tapped by hooks.

A hook runs around whatever forward its module has, so it does not matter which of several engines
came to a module first, and the module's own forward stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.places import Place
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Fuse, Setup
from adapterkit.hub.compose.fusions import fusion_for
from adapterkit.hub.compose.here import Current, Here, recompile
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.networks import State
from adapterkit.hub.compose.program import Network, Run, Site, build
from adapterkit.hub.compose.rows import Rows
from adapterkit.hub.findings import clean
from adapterkit.hub.primitives import Bottleneck, Coupling, Fusion
from adapterkit.registry.errors import InvalidError

Runs = Mapping[Place, Run]
# (rows of an input, None for all of them; what runs on them; within what)
Share = tuple[Tensor | None, Run | None, AbstractContextManager[None]]


@dataclass(frozen=True)
class Routed:
    """What runs for each mix of the rows."""

    runs: Sequence[Runs]
    rows: Rows


class Layers:
    """The taps of all places that anything was ever active at."""

    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._modules = dict(model.named_modules())
        self._taps: dict[Place, Tap] = {}
        self.current: Current[Runs | Routed] = Current({})

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> Runs:
        networks: dict[Place, dict[str, tuple[Network, float]]] = {}
        for name, weight in active.items():
            for network in _networks(lowered[name]):
                held = networks.setdefault(network.place, {})
                if name in held:
                    raise InvalidError(f"{clean(name)} has two networks at {network.place.h}")
                held[name] = network, weight
        runs: dict[Place, Run] = {}
        for place, held in networks.items():
            fusion = partial(_fusion_at, place, lowered)
            run = build(active.block, Site(place.h, held, fusion)) if active.block else None
            if run is not None:
                runs[place] = run
        missing = runs.keys() - self._taps.keys()
        for place in missing:
            self._taps[place] = Tap(place, self._modules, self.current)
        if missing:
            recompile()
        return runs

    def route(self, states: Sequence[Runs], rows: Rows) -> Routed | Runs:
        return Routed(states, rows) if any(states) else {}

    def remove(self) -> None:
        for tap in self._taps.values():
            tap.remove()
        self._taps.clear()


def _networks(lowered: Lowered) -> list[Network]:
    made = (primitive for each in lowered.updates.values() for primitive in each)
    return [primitive for primitive in made if isinstance(primitive, Bottleneck | Coupling)]


def _fusion_at(place: Place, lowered: Mapping[str, Lowered], block: Fuse) -> Fusion | None:
    name = fusion_for(block, lowered)
    made = (primitive for each in lowered[name].updates.values() for primitive in each)
    return next((p for p in made if isinstance(p, Fusion) and p.place == place), None)


class Tap:
    """Hooks on the modules of one place. current: what is active everywhere."""

    def __init__(
        self, place: Place, modules: Mapping[str, nn.Module], current: Current[Runs | Routed]
    ) -> None:
        self._place, self._current = place, current
        self._norm = modules[place.norm] if place.norm else None
        self._here = Here()
        self._handles: list[RemovableHandle] = []
        if place.x0 and not place.entry:
            hook = modules[place.x0].register_forward_pre_hook(self._enter, with_kwargs=True)
            self._handles.append(hook)
        if place.entry:
            hook = modules[place.h].register_forward_pre_hook(self._replace, with_kwargs=True)
        else:
            hook = modules[place.h].register_forward_hook(self._leave)
        self._handles.append(hook)
        if self._norm is not None:
            self._handles.append(self._norm.register_forward_hook(self._skip))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def _is_idle(self) -> bool:
        state = self._current.now
        if isinstance(state, Routed):
            return not any(self._place in runs for runs in state.runs)
        return self._place not in state

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_idle:
            self._here.x0 = args[0] if args else next(iter(kwargs.values()))

    def _replace(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._is_idle:
            return None
        if args:
            return (self._after(args[0], args[0]), *args[1:]), kwargs
        name, x = next(iter(kwargs.items()))
        return args, {**kwargs, name: self._after(x, x)}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._is_idle:
            return None
        h = output[0] if isinstance(output, tuple) else output
        x0 = vars(self._here).pop("x0", h)  # the embeddings have none
        y = self._after(h, x0.to(h.device))
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _runs(self, h: Tensor) -> Iterator[Share]:
        state = self._current.now
        if not isinstance(state, Routed):
            yield None, state.get(self._place), nullcontext()
            return
        rows = state.rows
        layout = rows.within(h.shape, self._place.h)
        for mix, index in rows.members(layout, h.device):
            yield index, state.runs[mix].get(self._place), rows.batch.part(mix)

    def _after(self, h: Tensor, x0: Tensor) -> Tensor:
        """What stands for h, so that what the layer makes of it is what it should be."""
        made, instead = [], []
        for index, run, part in self._runs(h):
            mine = (h, x0) if index is None else (h[index], x0[index])
            with part:  # the norm of the layer may be routed, too
                y, stands = self._settled(run, *mine)
            made.append((index, y))
            if stands:
                instead.append((index, y))
        if instead:
            self._here.instead = instead
        return _together(h, made)

    def _settled(self, run: Run | None, h: Tensor, x0: Tensor) -> tuple[Tensor, bool]:
        """(that, for some rows, whether it is what the norm behind must give)."""
        if run is None:
            return h, False
        state = run(State(h, x0, self._norm))
        if state.last is None or state.last.ln_after:
            return state.h.to(h.dtype), False
        if self._norm is not None:  # which then must not change it
            return state.h.to(h.dtype), True
        return (state.h - x0).to(h.dtype), False

    def _skip(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        found = vars(self._here).pop("instead", None)
        return None if found is None else _together(output, found)


def _together(whole: Tensor, parts: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor:
    """whole, with these rows of it made new; None is all rows."""
    if parts[0][0] is None:
        return parts[0][1]
    made = whole.clone()
    for index, rows in parts:
        made[index] = rows
    return made
