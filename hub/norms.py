"""How large the change of an adapter is, from its factors alone: no base, no torch.

|B A|^2 = sum(B^T B * A A^T): two r x r matrices, however large the module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import EMBEDDING, LINEAR, Module
from adapterkit.hub.findings import clean
from adapterkit.hub.frozen import ROLE as FROZEN
from adapterkit.hub.headers import FLOATS, Stored
from adapterkit.hub.kinds import kind
from adapterkit.hub.kinds.base import Used
from adapterkit.hub.primitives import BiasShift, LowRank, Primitive, Replace
from adapterkit.hub.values import decode
from adapterkit.registry.errors import AdapterError, DamagedError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# Roles whose effect is relative to the base's weight, beside factors that are not.
RELATIVE = ("magnitude", "lambda_b", "lambda_d", "outer", "inner")


class NeedsBaseError(AdapterError):
    """A value cannot be computed without the weights of the base."""


@dataclass(frozen=True)
class Parts:
    """What an adapter does to one module.

    factors: scaled (B, A) pairs that add up to the change of the weight; shift: of the bias.
    whole: parts that stand in the file as they are to be, such as `weight` or `tokens`: by how much
    they change the base, the base alone can tell.
    """

    factors: Sequence[tuple[NDArray[Any], NDArray[Any]]] = ()
    shift: NDArray[Any] | None = None
    whole: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Site:
    module: Module

    def tied(self, *roles: str) -> tuple[str, ...]:
        return ()

    @property
    def shared(self) -> Mapping[str, Tensor]:
        raise NeedsBaseError(f"{self.module.name} needs the shapes of the base")

    def bias(self) -> Tensor | None:
        raise NeedsBaseError(f"{self.module.name} needs the bias of the base")

    def weight(self) -> Tensor:
        raise NeedsBaseError(f"{self.module.name} needs the weights of the base")


def parts_of(adapter: Adapter, name: str) -> Parts:
    """name: of a module or a place, "" for what belongs to all. Raises DamagedError when a value is
    not finite."""
    held = adapter.modules.get(name, {}) if name else adapter.shared
    arrays: Any = {role: _array(stored) for role, stored in held.items()}
    tensors: Any = Used(arrays)
    whole = {role: tensors[role] for role in RELATIVE if role in tensors}
    if not name:
        return Parts(whole=tensors)
    try:
        primitives = _lower(adapter, name, tensors)
    except NeedsBaseError:
        rest = {role: tensor for role, tensor in tensors.items() if role not in whole}
        if not whole or not rest:
            return Parts(whole=arrays)
        primitives = _lower(adapter, name, rest)
        tensors.taken |= tensors.keys()
    whole |= {role: t for role, t in tensors.items() if _stands(role) and role not in tensors.taken}
    factors = [_scaled(each) for each in primitives if isinstance(each, LowRank)]
    shifts: list[Any] = [each.d for each in primitives if isinstance(each, BiasShift)]
    for primitive in primitives:
        if not isinstance(primitive, LowRank | BiasShift):
            whole |= _whole(primitive)
    return Parts(factors, sum(shifts[1:], shifts[0]) if shifts else None, whole)


def _stands(role: str) -> bool:
    """Whether a tensor that no module takes acts elsewhere, and is no copy of the base's."""
    return not role.startswith(("wrapper.", FROZEN))


def _lower(adapter: Adapter, name: str, tensors: Mapping[str, Any]) -> list[Primitive]:
    type_ = EMBEDDING if "embedding_A" in tensors else LINEAR
    site = _Site(Module(name, type_, ()))
    lowered = kind(adapter.kind).lower(adapter.fields, site, tensors)
    return [primitive for module, primitive in lowered if module == name]


def _scaled(primitive: LowRank) -> tuple[Any, Any]:
    b: Any = primitive.B
    if primitive.out_scale is not None:
        b = b * primitive.out_scale[:, None]
    return primitive.scale * b, primitive.A


def _whole(primitive: Primitive) -> dict[str, Any]:
    if isinstance(primitive, Replace):
        part = primitive.name if primitive.rows is None else f"rows {_rows(primitive.rows)}"
        return {f"replaced {part}": primitive.T}
    arrays = {name: value for name, value in vars(primitive).items() if hasattr(value, "shape")}
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(primitive).__name__).lower()
    return {f"{words} {name}": value for name, value in arrays.items()}


def _rows(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows[:4])) + (", ..." if len(rows) > 4 else "")


def _array(stored: Stored) -> NDArray[Any]:
    import numpy as np

    if stored.dtype not in FLOATS:
        raise DamagedError(f"{clean(stored.key)} has dtype {stored.dtype}, expected floats")
    found = decode(stored.read(), stored.dtype).astype(np.float64).reshape(stored.shape)
    if not np.isfinite(found).all():
        raise DamagedError(f"{clean(stored.key)} holds values that are not finite")
    return found


def inner(one: Parts, other: Parts) -> float:
    """The inner product of two changes of a weight, as if they were vectors."""
    total = 0.0
    for b, a in one.factors:
        for d, c in other.factors:
            if b.shape[0] == d.shape[0] and a.shape[1] == c.shape[1]:
                total += float(((b.T @ d) * (a @ c.T)).sum())
    return total


def norm(parts: Parts) -> float:
    """Frobenius norm of the change of the weight."""
    return math.sqrt(max(inner(parts, parts), 0.0))


def distance(one: Parts, other: Parts) -> float:
    """Frobenius norm of the difference of two changes; exactly 0 for equal factors.

    Differences below about 1e-8 of the changes themselves are lost in rounding.
    """
    if _same(one, other):
        return 0.0
    both = Parts([*one.factors, *((-b, a) for b, a in other.factors)])
    return norm(both)


def _same(one: Parts, other: Parts) -> bool:
    import numpy as np

    return len(one.factors) == len(other.factors) and all(
        np.array_equal(b, d) and np.array_equal(a, c)
        for (b, a), (d, c) in zip(one.factors, other.factors, strict=True)
    )
