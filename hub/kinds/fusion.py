"""AdapterFusion: at every place, attention over what several bottlenecks give.

Pfeiffer et al. 2020, arXiv:2005.00247.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.bases.places import EMBEDDINGS, places
from adapterkit.hub.fields import FusionFields
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.kinds import placed
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.placed import Form, Size
from adapterkit.hub.primitives import Fusion as Joined

if TYPE_CHECKING:
    from torch import Tensor


class Fusion:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary(f"fusion of {', '.join(adapter.fields.names)}")

    def problems(self, adapter: Adapter) -> list[Finding]:
        form = _form(adapter.fields, adapter.fields.width)
        found = [
            finding
            for path, tensors in adapter.modules.items()
            for finding in placed.faults(tensors, path, form)
        ]
        if not adapter.modules:
            found.append(Finding(ERROR, "no-factors", "the weights", "matrices of places", "none"))
        return found

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return Schema({})  # what there is depends on the family: `schema_on`

    def schema_on(self, adapter: Adapter, base: Base) -> Schema:
        """At all places of a name, or at none: which the joined adapters have is their business."""
        found = {path: one for path, one in places(base).items() if one.name != EMBEDDINGS}
        names = {found[path].name for path in adapter.modules if path in found}
        tensors: dict[tuple[str, str], Expected] = {}
        for path, one in found.items():
            if one.name in names:
                tensors |= placed.expected(path, _form(adapter.fields, one.width))
        return Schema(tensors, tuple(placed.unplaced(base)))

    def lower(self, fields: Any, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from ()  # no tensor of this kind belongs to a module with a weight

    def lower_whole(
        self, fields: FusionFields, base: Base, p: Mapping[tuple[str, str], Tensor]
    ) -> Lowered:
        import torch

        found = places(base)
        for path in dict.fromkeys(path for path, _ in p):
            made: dict[str, Tensor | None] = {
                role: torch.cat([p[path, role], p[path, f"{role}_bias"][:, None]], dim=1)
                for role in ("query", "key")
                if (path, role) in p
            }
            if fields.value:
                made["value"] = p[path, "value"]
            yield (
                found[path].layer,
                Joined(found[path].place, fields.names, mixing=fields.mixing, **made),
            )


def _form(fields: FusionFields, width: Size) -> Form:
    return dict(_tensors(fields, width))


def _tensors(fields: FusionFields, width: Size) -> Iterator[tuple[str, tuple[Size, ...]]]:
    for role, has in (("query", fields.query), ("key", fields.key)):
        if has:
            yield role, (width, width)
            yield f"{role}_bias", (width,)
    if fields.value:
        yield "value", (width, width)
