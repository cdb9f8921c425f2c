"""From an adapter to primitives without a model: over a checkpoint on disk, or over nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV, EMBEDDING, LINEAR, Base, Module
from adapterkit.hub.findings import clean
from adapterkit.hub.kinds import kind
from adapterkit.hub.kinds.base import Used, Whole
from adapterkit.hub.primitives import Primitive
from adapterkit.registry.errors import InvalidError, MismatchError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.hub.quant.stored import Weights


class NeedsBaseError(InvalidError):
    """What is asked for cannot be computed without the base."""


@dataclass(frozen=True)
class Ground:
    """What an adapter is lowered over. base, weights: None where there is no base."""

    adapter: Adapter
    base: Base | None = None
    weights: Weights | None = None

    @classmethod
    def of(cls, adapter: Adapter, base: Base | None, quantization: str | None = None) -> Ground:
        if base is None:
            return cls(adapter)
        from adapterkit.hub.bases.spelling import spelled
        from adapterkit.hub.quant.stored import Weights

        named = spelled(base, adapter.modules).base
        return cls(adapter, named, Weights(named, quantization))

    def module(self, name: str) -> Module:
        """Its row of the base; without one, what the adapter's tensors tell: no shape."""
        if self.base is not None:
            return self.base.modules[name]
        roles = self.adapter.modules.get(name, {})
        type_ = EMBEDDING if "embedding_A" in roles else CONV if self.kernel(name) else LINEAR
        return Shapeless(name, type_, self)

    def weight(self, name: str) -> Tensor:
        """(out, in), float32, of a convolution (out, in k), of a norm (out). Raises NeedsBaseError
        where there is no base."""
        if self.weights is None:
            raise self.needs(f"the weights of {clean(name)}")
        found = self.weights.weight(name)
        return found if found.ndim == 1 else found.flatten(1)

    def kernel(self, name: str) -> tuple[int, ...]:
        """Sizes of the kernel of a convolution, () for any other module."""
        stored = self.adapter.tensors.get((name, "A"))
        if self.base is None:
            return () if stored is None else stored.shape[2:]
        module = self.base.modules[name]
        return module.shape[2:] if module.type == CONV else ()

    def is_grouped(self, name: str) -> bool:
        """Whether it is a convolution that sees a part of its inputs only."""
        if self.base is not None:
            return self.base.modules[name].groups > 1
        held = self.adapter.modules.get(name, {})
        if not self.kernel(name) or not {"A", "B"} <= held.keys():
            return False
        return held["A"].shape[0] != held["B"].shape[1]

    def bias(self, name: str) -> Tensor | None:
        if self.weights is None:
            raise self.needs(f"the bias of {clean(name)}")
        return self.weights.bias(name)

    @cached_property
    def shared(self) -> Mapping[str, Tensor]:
        """The adapter's tensors for all modules, float64. Their parts follow from the shapes of the
        base."""
        if self.base is None:
            raise self.needs("the shapes of the base")
        from adapterkit.hub.tensors import read_tensor

        schema = kind(self.adapter.kind).schema(self.adapter, self.base.modules)
        held = {role: read_tensor(stored) for role, stored in self.adapter.shared.items()}
        return {role: tensor.double() for role, tensor in {**schema.shared(), **held}.items()}

    def needs(self, what: str) -> NeedsBaseError:
        variant = kind(self.adapter.kind).summary(self.adapter).variant
        return NeedsBaseError(
            f"{clean(self.adapter.name)} ({variant}) cannot be computed without {what}",
            hint="give the base: --base BASE",
        )


class Shapeless(Module):
    """A module of a base that is not there: it has a name and a type, and no shape."""

    def __init__(self, name: str, type_: str, ground: Ground) -> None:
        super().__init__(name, type_, ())
        vars(self)["_ground"] = ground
        del vars(self)["shape"]

    def __getattr__(self, name: str) -> NoReturn:  # of what `vars` does not hold: the shape
        if name.startswith("_"):
            raise AttributeError(name)
        raise vars(self)["_ground"].needs(f"the {name} of {clean(self.name)}")


@dataclass(frozen=True)
class StoredSite:
    """A module as a kind sees it. Whatever is tied to it stays a matter of whoever reads the
    result, as it is said in its config."""

    module: Module
    ground: Ground

    def tied(self, *roles: str) -> tuple[str, ...]:
        return ()

    @property
    def shared(self) -> Mapping[str, Tensor]:
        return self.ground.shared

    def weight(self) -> Tensor:
        return self.ground.weight(self.module.name)

    def bias(self) -> Tensor | None:
        return self.ground.bias(self.module.name)


def lowered(
    ground: Ground, tensors: Mapping[tuple[str, str], Tensor]
) -> Iterator[tuple[str, tuple[Primitive, ...]]]:
    """(module, its primitives) of one module after the other, so that one weight is held at a time.

    tensors: the adapter's, float64, by (module, role). Raises NeedsBaseError, and MismatchError if
    a tensor would be left out, or belongs to no module with a weight.
    """
    adapter, made = ground.adapter, kind(ground.adapter.kind)
    if isinstance(made, Whole) and ground.base is not None:
        elsewhere = sorted({module for module, _ in tensors} - ground.base.modules.keys())
        if elsewhere:
            raise not_weights(adapter, elsewhere[0])
    elif isinstance(made, Whole):
        raise not_weights(adapter, "")
    for name in adapter.modules:
        yield name, lowered_at(ground, name, tensors)


def lowered_at(
    ground: Ground, name: str, tensors: Mapping[tuple[str, str], Tensor]
) -> tuple[Primitive, ...]:
    """The primitives of one module of the adapter. Raises as `lowered` does."""
    return tuple(p for _, p in targeted_at(StoredSite(ground.module(name), ground), tensors))


def targeted_at(
    site: StoredSite, tensors: Mapping[tuple[str, str], Tensor]
) -> tuple[tuple[str, Primitive], ...]:
    """The same, each with the module it acts on: whatever is tied to the site's, too."""
    adapter, name = site.ground.adapter, site.module.name
    held = adapter.modules[name]
    roles = Used({role: tensors[name, role] for role in held if (name, role) in tensors})
    found = tuple(kind(adapter.kind).lower(adapter.fields, site, roles))
    left = [held[role].key for role in roles if role not in roles.taken]
    if left:
        shown = ", ".join(map(clean, left))
        raise MismatchError(f"{clean(adapter.name)}: nothing applies {shown}")
    return found


def not_weights(adapter: Adapter, place: str) -> InvalidError:
    """For an adapter that acts elsewhere than in the weights of modules."""
    variant = kind(adapter.kind).summary(adapter).variant
    where = f" at {clean(place)}" if place else ""
    return InvalidError(
        f"{clean(adapter.name)} ({variant}) acts{where} on the layers or the input of the model,"
        " not on its weights: no change of a weight equals it"
    )
