"""Heads of an adapter's own in place of the base's, on a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Setup
from adapterkit.hub.compose.here import Current, recompile
from adapterkit.hub.compose.interventions import require_stacked
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.rows import Rows
from adapterkit.hub.findings import clean
from adapterkit.hub.primitives import FirstToken, Head
from adapterkit.registry.errors import InvalidError

Own = Head | FirstToken
# module -> what stands in for its output
State = Mapping[str, Own]


@dataclass(frozen=True)
class Routed:
    """One state for each mix of the rows."""

    states: Sequence[State]
    rows: Rows


class Heads:
    """Hooks on the modules whose output is another's."""

    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._modules = dict(model.named_modules())
        self._handles: dict[str, RemovableHandle] = {}
        self.current: Current[State | Routed] = Current({})

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> State:
        found: dict[str, Own] = {}
        for name, weight in active.items():
            for module, made in lowered[name].updates.items():
                for primitive in made:
                    if isinstance(primitive, Own):
                        require_stacked(active, name, "brings a head of its own")
                        _require_alone(active, lowered, (name, weight), module)
                        found[module] = primitive
        missing = found.keys() - self._handles.keys()
        for module in missing:
            hook = partial(self._instead, module)
            self._handles[module] = self._modules[module].register_forward_hook(hook)
        if missing:
            recompile()
        return found

    def route(self, states: Sequence[State], rows: Rows) -> Routed | State:
        return Routed(states, rows) if any(states) else {}

    def remove(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _instead(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state = self.current.now
        if not isinstance(state, Routed):
            return _made(state[path], args[0]) if path in state else None
        if not any(path in each for each in state.states):
            return None
        layout = state.rows.within(args[0].shape, path)
        parts = [
            (index, _made(state.states[mix][path], args[0][index]))
            if path in state.states[mix]
            else (index, output[index])
            for mix, index in state.rows.members(layout, args[0].device)
        ]
        sizes = {tuple(part.shape[1:]) for _, part in parts}
        if len(sizes) > 1:
            shown = " and ".join(map(str, sorted(sizes)))
            raise InvalidError(f"{path} gives rows of {shown}: heads of one batch have one size")
        index = torch.cat([index for index, _ in parts])
        return torch.cat([part for _, part in parts])[index.argsort()]


def _require_alone(
    active: Setup, lowered: Mapping[str, Lowered], one: tuple[str, float], module: str
) -> None:
    """A head of other layers cannot be mixed with another one: it takes the weights 0 and 1."""
    name, weight = one
    others = {n: active[n] for n in active if n != name and _acts_in(module, lowered[n])}
    if others or weight != 1:
        shown = ", ".join(f"{clean(n)}={w:g}" for n, w in [(name, weight), *others.items()])
        raise InvalidError(
            f"{clean(name)} brings a head of its own for {module}: it takes weight 1 from one"
            f" adapter, found {shown}"
        )


def _acts_in(module: str, lowered: Lowered) -> bool:
    """Whether it changes what is not asked any more, be it deep inside."""
    return any(f"{path}.".startswith(f"{module}.") for path in lowered.updates)


def _made(primitive: Own, given: Tensor) -> Tensor:
    x = given
    if isinstance(primitive, FirstToken):
        return x[:, 0]
    x = x[:, 0] if primitive.first else x
    last = len(primitive.weights) - 1
    for number, (weight, bias) in enumerate(zip(primitive.weights, primitive.biases, strict=True)):
        x = functional.linear(x.to(weight.dtype), weight, bias)
        if number < last and primitive.act is not None:
            x = ACT2FN[primitive.act](x)
    return x.to(given.dtype)
