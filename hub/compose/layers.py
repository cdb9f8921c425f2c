"""Layer updates: small networks at places of layers, tapped by hooks.

A hook runs around whatever forward its module has, so it does not matter which of several engines
came to a module first, and the module's own forward stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.places import Place
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Fuse, Setup
from adapterkit.hub.compose.fusions import fusion_for
from adapterkit.hub.compose.here import Here
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.networks import State
from adapterkit.hub.compose.program import Network, Run, Site, build
from adapterkit.hub.findings import clean
from adapterkit.hub.primitives import Bottleneck, Coupling, Fusion
from adapterkit.registry.errors import InvalidError


class Layers:
    """The taps of all places that anything was ever active at."""

    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._modules = dict(model.named_modules())
        self._taps: dict[Place, Tap] = {}

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> Callable[[], None]:
        networks: dict[Place, dict[str, tuple[Network, float]]] = {}
        for name, weight in active.items():
            for network in _networks(lowered[name]):
                held = networks.setdefault(network.place, {})
                if name in held:
                    raise InvalidError(f"{clean(name)} has two networks at {network.place.h}")
                held[name] = network, weight
        runs: dict[Place, Run | None] = dict.fromkeys(self._taps)
        for place, held in networks.items():
            fusion = partial(_fusion_at, place, lowered)
            if active.block is not None:
                runs[place] = build(active.block, Site(place.h, held, fusion))
        return partial(self._switch, runs)

    def _switch(self, runs: Mapping[Place, Run | None]) -> None:
        for place, run in runs.items():
            if run is not None and place not in self._taps:
                self._taps[place] = Tap(place, self._modules)
            if place in self._taps:
                self._taps[place].run = run

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
    """Hooks on the modules of one place. run: what is active there, None for nothing."""

    def __init__(self, place: Place, modules: Mapping[str, nn.Module]) -> None:
        self.run: Run | None = None
        self._norm = modules[place.norm] if place.norm else None
        self._entry = place.entry
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
        self.run = None
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.run is not None:
            self._here.x0 = args[0] if args else next(iter(kwargs.values()))

    def _replace(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.run is None:
            return None
        if args:
            return (self._after(args[0], args[0]), *args[1:]), kwargs
        name, x = next(iter(kwargs.items()))
        return args, {**kwargs, name: self._after(x, x)}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.run is None:
            return None
        h = output[0] if isinstance(output, tuple) else output
        x0 = vars(self._here).pop("x0", h)  # the embeddings have none
        y = self._after(h, x0)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _after(self, h: Tensor, x0: Tensor) -> Tensor:
        """What stands for h, so that what the layer makes of it is what it should be."""
        if self.run is None:
            return h
        state = self.run(State(h, x0.to(h.device), self._norm))
        if state.last is None or state.last.ln_after:
            return state.h.to(h.dtype)
        if self._norm is not None:  # which then must not change it
            y = self._here.instead = state.h.to(h.dtype)
            return y
        return (state.h - x0).to(h.dtype)

    def _skip(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        found: Tensor | None = vars(self._here).pop("instead", None)
        return found
