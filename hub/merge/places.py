"""Which tensor of a checkpoint holds what: a parameter at run time, or the part of a fused one."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.hub.bases.base import EXPERTS, Base, Module
from adapterkit.hub.bases.names import family_of
from adapterkit.hub.findings import clean
from adapterkit.hub.merge.lowering import Lowering
from adapterkit.hub.merge.update import TRANSPOSED, moves_bias, same
from adapterkit.registry.errors import MismatchError


@dataclass(frozen=True)
class Place:
    """row: of the module table. parameter: weight or bias. expert, start, stop: of a fused weight,
    the rows of one expert that this tensor is; None where it is all of it."""

    row: str
    parameter: str = "weight"
    expert: int | None = None
    start: int = 0
    stop: int = 0

    def name(self, module: Module) -> str:
        """What a report calls it."""
        if module.type == EXPERTS:
            return self.row if self.expert is None else f"{self.row}[{self.expert}]"
        return f"{self.row}.{self.parameter}"


def places(base: Base) -> dict[str, Place]:
    """Checkpoint tensor -> what it holds, of those that belong to a module."""
    found: dict[str, Place] = {}
    for row in base.modules.values():
        if row.type == EXPERTS and len(row.weight) > 1:
            found |= _of_experts(row)
        elif row.weight:
            found[row.weight[0]] = Place(row.name)
        if row.bias:
            found[row.bias] = Place(row.name, "bias")
    return found


def _of_experts(row: Module) -> dict[str, Place]:
    count, rows, _ = row.shape
    parts = len(row.weight) // count
    size = rows // parts
    return {
        key: Place(row.name, "weight", i // parts, i % parts * size, (i % parts + 1) * size)
        for i, key in enumerate(row.weight)
    }


@dataclass(frozen=True)
class Added:
    """A tensor that the base's files do not have: of a head that only an adapter has, or of one
    that is no longer the table it was tied to. source: whose values it starts from."""

    key: str
    place: Place
    source: str | None


def added(base: Base, lowering: Lowering) -> tuple[list[Added], bool]:
    """(tensors to add, whether tied tables become two). Raises MismatchError where the family ties
    them whatever its config says."""
    found: list[Added] = []
    untied = _is_untied(base, lowering)
    for row in base.modules.values():
        key = f"{row.name}.weight"
        if untied and row.tied_to and not row.weight:
            found.append(Added(key, Place(row.name), base.modules[row.tied_to].weight[0]))
        elif row.name in lowering.rows and not row.weight and not row.tied_to:
            found += _head(row)
            continue
        if row.name in lowering.rows and row.bias == "" and moves_bias(lowering.updates(row.name)):
            found.append(Added(f"{row.name}.bias", Place(row.name, "bias"), None))
    return found, untied


def _head(row: Module) -> list[Added]:
    weight = [Added(f"{row.name}.weight", Place(row.name), None)]
    bias = [Added(f"{row.name}.bias", Place(row.name, "bias"), None)]
    return weight + (bias if row.bias == "" else [])


def _is_untied(base: Base, lowering: Lowering) -> bool:
    differing = [
        row
        for row in base.modules.values()
        if row.tied_to
        and (row.name in lowering.rows or row.tied_to in lowering.rows)
        and not _changes_alike(base, row, base.modules[row.tied_to], lowering)
    ]
    if differing and family_of(base.config).always_tied:
        row = differing[0]
        raise MismatchError(
            f"{clean(row.name)} and {clean(row.tied_to or '')} are one table in every"
            f" {base.model_type}, and the adapters change only one of them",
            hint="attach the adapters instead: adapterkit.hub.load(BASE, adapters)",
        )
    return bool(differing)


def _changes_alike(base: Base, row: Module, owner: Module, lowering: Lowering) -> bool:
    turned = (row.type in TRANSPOSED) != (owner.type in TRANSPOSED)
    return same(lowering.updates(row.name), lowering.updates(owner.name), turned=turned)
