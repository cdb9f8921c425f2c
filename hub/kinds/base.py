"""What a kind of adapter is: its schema, and its lowering to primitives. No file key here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.findings import Finding
from adapterkit.hub.primitives import Primitive

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Expected:
    """A tensor the config implies. required: its absence is an error."""

    shape: tuple[int, ...]
    required: bool = True


@dataclass(frozen=True)
class Schema:
    """All tensors an adapter of this config may hold on a base, and what stands in the way.

    shared: makes the tensors for all modules that the file leaves out, by role.
    """

    tensors: dict[tuple[str, str], Expected]
    findings: tuple[Finding, ...] = ()
    shared: Callable[[], Mapping[str, Tensor]] = dict


class Site(Protocol):
    """The module a kind is lowered for, on a live model or in a checkpoint."""

    @property
    def module(self) -> Module: ...

    def tied(self, *roles: str) -> tuple[str, ...]:
        """Modules that share this one's weight, without those for which the file holds a tensor of
        one of these roles: what it says of them itself counts."""
        ...

    @property
    def shared(self) -> Mapping[str, Tensor]:
        """The adapter's tensors for all modules, by role."""
        ...

    def weight(self) -> Tensor:
        """The base's weight, dequantized, float32, (out, in)."""
        ...

    def bias(self) -> Tensor | None:
        """The base's bias (out), None where the module has none."""
        ...


@dataclass(frozen=True)
class Summary:
    """What a listing shows. variant: in the field's words; ranks: one for each module."""

    variant: str
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()


Lowered = Iterator[tuple[str, Primitive]]
K = TypeVar("K")


class Used(dict[K, "Tensor"]):
    """Tensors by role, or by place, that remember which of them were taken."""

    def __init__(self, tensors: Mapping[K, Tensor]) -> None:
        super().__init__(tensors)
        self.taken: set[K] = set()

    def __getitem__(self, key: K) -> Tensor:
        self.taken.add(key)
        return super().__getitem__(key)


class Kind(Protocol):
    def summary(self, adapter: Adapter) -> Summary: ...

    def problems(self, adapter: Adapter) -> list[Finding]:
        """What is wrong with the adapter in itself: shapes and roles, no base needed."""
        ...

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        """The tensors this adapter should hold on a base with these modules."""
        ...

    def lower(self, fields: Any, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        """Primitives for one module of the file, each with the module it acts on.

        p: the adapter's tensors of this module by role, float32.
        """
        ...


@runtime_checkable
class Whole(Protocol):
    """What a kind offers besides when some of its tensors belong to no module with a weight: to a
    place in a layer, or to the model as a whole."""

    def lower_whole(
        self, fields: Any, base: Base, p: Mapping[tuple[str, str], Tensor]
    ) -> Lowered:
        """Primitives for all such tensors together, each with the module it acts on, "" for the
        model itself.

        p: tensors by (path, role), float32; the path of one that belongs to all is "".
        """
        ...


@runtime_checkable
class Based(Protocol):
    """What a kind offers besides when its tensors depend on more of a base than its modules."""

    def schema_on(self, adapter: Adapter, base: Base) -> Schema:
        """Stands for `schema`."""
        ...
