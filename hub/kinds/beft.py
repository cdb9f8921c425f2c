"""BEFT: a bias that is added to the output of a linear layer.  arXiv:2509.15974."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import LINEAR, Module
from adapterkit.hub.fields import PlainFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import BiasShift

if TYPE_CHECKING:
    from torch import Tensor


class Beft:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("BEFT")

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, RULES)

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return targeted.schema(adapter, modules, RULES)

    def lower(self, fields: PlainFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "shift" in p:
            yield site.module.name, BiasShift(p["shift"].flatten())


def _form(module: str, tensors: Tensors) -> Form:
    return {"shift": (1, OUT)}


RULES = Rules(frozenset({"shift"}), (LINEAR,), _form)
