"""Heads of an adapter's own in place of the base's, on a live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Setup
from adapterkit.hub.compose.interventions import require_stacked
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.findings import clean
from adapterkit.hub.primitives import FirstToken, Head
from adapterkit.registry.errors import InvalidError


class Heads:
    """Hooks on the modules whose output is another's."""

    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._modules = dict(model.named_modules())
        self._handles: list[RemovableHandle] = []

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> Callable[[], None]:
        found: dict[str, tuple[str, Head | FirstToken]] = {}
        for name, weight in active.items():
            for module, made in lowered[name].updates.items():
                for primitive in made:
                    if isinstance(primitive, Head | FirstToken):
                        require_stacked(active, name, "brings a head of its own")
                        _require_alone(active, lowered, (name, weight), module)
                        found[module] = name, primitive
        return lambda: self._switch({module: made for module, (_, made) in found.items()})

    def _switch(self, found: Mapping[str, Head | FirstToken]) -> None:
        self.remove()
        for module, primitive in found.items():
            hook = partial(_instead, primitive)
            self._handles.append(self._modules[module].register_forward_hook(hook))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


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


def _instead(
    primitive: Head | FirstToken, module: nn.Module, args: tuple[Any, ...], output: Any
) -> Tensor:
    x: Tensor = args[0]
    if isinstance(primitive, FirstToken):
        return x[:, 0]
    x = x[:, 0] if primitive.first else x
    last = len(primitive.weights) - 1
    for number, (weight, bias) in enumerate(zip(primitive.weights, primitive.biases, strict=True)):
        x = functional.linear(x.to(weight.dtype), weight, bias)
        if number < last and primitive.act is not None:
            x = ACT2FN[primitive.act](x)
    return x.to(args[0].dtype)
