"""Bottlenecks in the layers of a model, u(z) = s (W_up act(W_down z + b_down) + b_up), and, after
the embeddings, an invertible coupling.

Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247, arXiv:2005.00052.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.bases.places import EMBEDDINGS, Found, places
from adapterkit.hub.fields import BottleneckFields
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.kinds import placed, replaced
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.placed import Form, Size
from adapterkit.hub.primitives import Bottleneck as Network
from adapterkit.hub.primitives import Coupling
from adapterkit.registry.errors import DamagedError

if TYPE_CHECKING:
    from torch import Tensor

# Whole names of what a config says, for a listing.
SEVERAL = {("attention", "output"): "Houlsby", ("output",): "Pfeiffer"}


class Bottleneck:
    def summary(self, adapter: Adapter) -> Summary:
        fields: BottleneckFields = adapter.fields
        kind = "parallel" if fields.wiring.parallel else SEVERAL.get(fields.places, "bottleneck")
        return Summary(self.variant(kind), tuple(self.sizes(adapter)))

    def variant(self, kind: str) -> str:
        return kind if kind == "bottleneck" else f"{kind} bottleneck"

    def sizes(self, adapter: Adapter) -> Iterator[int]:
        """d of every place that the file has."""
        for held in adapter.modules.values():
            yield from held["down"].shape[:1] if "down" in held else ()

    def problems(self, adapter: Adapter) -> list[Finding]:
        """Against forms in which only the width is known, as no base is."""
        fields: BottleneckFields = adapter.fields
        found = placed.faults(adapter.shared, "", self.shared_form(fields, fields.width, None))
        held = placed.own(adapter)
        for path, tensors in held.items():
            if path.rpartition(".")[2] == EMBEDDINGS:
                form = coupling_form(fields, fields.width)
            else:
                form = self.form(fields, fields.width, None)
            found += placed.faults(tensors, path, form)
        if not held:
            found.append(Finding(ERROR, "no-factors", "the weights", "bottlenecks", "none"))
        return found + placed.problems(adapter)

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return Schema({})  # what there is depends on the family: `schema_on`

    def schema_on(self, adapter: Adapter, base: Base) -> Schema:
        fields: BottleneckFields = adapter.fields
        tensors: dict[tuple[str, str], Expected] = {}
        findings = placed.unplaced(base)
        for path, found in places(base).items():
            if found.name == EMBEDDINGS:
                form = coupling_form(fields, found.width)
            elif found.name in fields.places and found.number not in fields.leave_out:
                size = fields.size(found.number, found.width)
                findings += self.unfit(fields, found, size)
                form = self.form(fields, found.width, size or 1)
                tensors |= placed.expected("", self.shared_form(fields, found.width, size or 1))
            else:
                continue
            tensors |= placed.expected(path, form)
        rest = replaced.schema(adapter, fields.replaced, base.modules, ())
        return Schema(rest.tensors | tensors, (*findings, *rest.findings))

    def unfit(self, fields: BottleneckFields, found: Found, size: int | None) -> Iterable[Finding]:
        """Why the config cannot make this place."""
        if size is None:
            about = f"none for layer {found.number}, and no default"
            yield Finding(ERROR, "missing-factor", "reduction_factor", "one for each layer", about)

    def lower(self, fields: Any, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)

    def lower_whole(
        self, fields: BottleneckFields, base: Base, p: Mapping[tuple[str, str], Tensor]
    ) -> Lowered:
        held: dict[str, list[str]] = {}
        for path, role in p:
            held.setdefault(path, []).append(role)
        shared = {role: p["", role] for role in held.pop("", ())}
        found = places(base)
        for path, roles in held.items():
            own = {role: p[path, role] for role in roles}
            if found[path].name == EMBEDDINGS:
                yield found[path].layer, _coupling(fields, found[path], own)
            else:
                own |= self.dense(own, shared)
                yield found[path].layer, _network(fields, found[path], own)

    # What Compacter has in place of two dense projections.

    def form(self, fields: BottleneckFields, width: Size, size: Size) -> Form:
        """The tensors of one place. size: d."""
        dense: Form = {
            "down": (size, width), "down_bias": (size,), "up": (width, size), "up_bias": (width,)
        }  # fmt: skip
        return {**dense, **other_form(fields, width)}

    def shared_form(self, fields: BottleneckFields, width: Size, size: Size) -> Form:
        return {}

    def dense(self, own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`down` (d, h) and `up` (h, d) where they are not among a place's own tensors."""
        return {}


def other_form(fields: BottleneckFields, width: Size) -> Form:
    """What stands around the two projections."""
    form: dict[str, tuple[Size, ...]] = {}
    if isinstance(fields.scaling, str):
        form["scaling"] = (1,) if fields.scaling == "learned" else (width,)
    if fields.gate:
        form |= {"gate": (1, width), "gate_bias": (1,)}
    if fields.norm_before:  # which the library writes a second time
        names = ("norm_before", "norm_before_bias", "norm_copy", "norm_copy_bias")
        form |= dict.fromkeys(names, (width,))
    if fields.norm_after:
        form |= dict.fromkeys(("norm_after", "norm_after_bias"), (width,))
    return form


def coupling_form(fields: BottleneckFields, width: Size) -> Form:
    """F reads the second half and gives the first, G the other way round."""
    if fields.coupling is None:
        return {}
    form: dict[str, tuple[Size, ...]] = {}
    first = None if width is None else width // 2
    second = None if width is None or first is None else width - first
    for net, n_in, n_out in (("F", second, first), ("G", first, second)):
        size = None if n_in is None else int(n_in // fields.coupling)
        form[f"{net}_down"], form[f"{net}_down_bias"] = (size, n_in), (size,)
        form[f"{net}_up"], form[f"{net}_up_bias"] = (n_out, size), (n_out,)
    return form


def _coupling(fields: BottleneckFields, found: Found, p: Mapping[str, Tensor]) -> Coupling:
    f, g = (
        (p[f"{net}_down"], p[f"{net}_down_bias"], p[f"{net}_up"], p[f"{net}_up_bias"])
        for net in "FG"
    )
    return Coupling(found.place, f, g, fields.act)


def _network(fields: BottleneckFields, found: Found, p: Mapping[str, Tensor]) -> Network:
    import torch

    def beside(name: str) -> Tensor | None:
        return torch.stack([p[name], p[f"{name}_bias"]]) if name in p else None

    for end in ("", "_bias") if fields.norm_before else ():
        if not torch.equal(p[f"norm_copy{end}"], p[f"norm_before{end}"]):
            raise DamagedError(f"the two copies of the first norm of {found.path} differ")
    gate = torch.cat([p["gate"].flatten(), p["gate_bias"]]) if "gate" in p else None
    scale = fields.scaling if isinstance(fields.scaling, float) else p["scaling"]
    return Network(
        found.place,
        p["down"],
        p["up"],
        p.get("down_bias"),
        p.get("up_bias"),
        fields.act,
        scale,
        beside("norm_before"),
        beside("norm_after"),
        gate,
        fields.wiring,
    )
