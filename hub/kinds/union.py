"""Several kinds in one adapter, all of which act in the same forward.

MAM, a prefix and a parallel bottleneck: He et al. 2021, arXiv:2110.04366. UniPELT, the same and a
LoRA behind gates: Mao et al. 2022, arXiv:2110.07577.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.fields import UnionFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.kinds import kind, placed, replaced, schema_of
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary, Used, Whole

if TYPE_CHECKING:
    from torch import Tensor


class Union:
    def summary(self, adapter: Adapter) -> Summary:
        found = [kind(part.kind).summary(part) for part in _parts(adapter)]
        return Summary(
            " + ".join(one.variant for one in found),
            tuple(rank for one in found for rank in one.ranks),
            tuple(sorted({alpha for one in found for alpha in one.alphas})),
        )

    def problems(self, adapter: Adapter) -> list[Finding]:
        found = []
        for part in _parts(adapter):
            made = kind(part.kind)
            found += made.problems(part)
            if part.shared and not isinstance(made, Whole):
                about = f"a {part.kind}, whose modules share tensors"
                found.append(Finding(ERROR, UNSUPPORTED, "configs", "parts of their own", about))
        return found + placed.problems(adapter)

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return Schema({})  # parts may depend on more than modules: `schema_on`

    def schema_on(self, adapter: Adapter, base: Base) -> Schema:
        rest = replaced.schema(adapter, adapter.fields.replaced, base.modules, ())
        tensors: dict[tuple[str, str], Expected] = dict(rest.tensors)
        findings = list(rest.findings)
        for number, part in enumerate(_parts(adapter)):
            made = schema_of(part, base)
            tensors |= {(path, f"{number}.{role}"): t for (path, role), t in made.tensors.items()}
            findings += made.findings
        return Schema(tensors, tuple(findings))

    def lower(self, fields: UnionFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        for number, part in enumerate(fields.parts):
            start = f"{number}."
            own = Used({r.removeprefix(start): p.get(r) for r in p if r.startswith(start)})  # type: ignore[misc]
            made = list(kind(part.kind).lower(part.fields, site, own)) if own else []
            for role in own.taken:
                p[f"{start}{role}"]  # so that it counts as taken here too
            yield from made

    def lower_whole(
        self, fields: UnionFields, base: Base, p: Mapping[tuple[str, str], Tensor]
    ) -> Lowered:
        for number, part in enumerate(fields.parts):
            made, start = kind(part.kind), f"{number}."
            own = {(x, r.removeprefix(start)): (x, r) for x, r in p if r.startswith(start)}
            if own and isinstance(made, Whole):
                yield from made.lower_whole(part.fields, base, {k: p[v] for k, v in own.items()})


def _parts(adapter: Adapter) -> Iterator[Adapter]:
    """Each part as an adapter of its own, without what the head replaces."""
    for number, part in enumerate(adapter.fields.parts):
        start = f"{number}."
        tensors = {
            (path, role.removeprefix(start)): stored
            for (path, role), stored in adapter.tensors.items()
            if role.startswith(start)
        }
        yield replace(
            adapter, kind=part.kind, fields=part.fields, targets=part.targets, tensors=tensors
        )
