"""Rows of the token table, trained alone and replaced.  peft 0.21 `tuners/trainable_tokens`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Module
from adapterkit.hub.fields import TokensFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.kinds import replaced
from adapterkit.hub.kinds.base import Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.lora import form_faults

if TYPE_CHECKING:
    from torch import Tensor


class TrainableTokens:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("trainable tokens")

    def problems(self, adapter: Adapter) -> list[Finding]:
        found = [f for (_, role), t in adapter.tensors.items() for f in form_faults(role, t)]
        return found + replaced.problems(adapter, adapter.fields.replaced)

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return replaced.schema(adapter, adapter.fields.replaced, modules, ())

    def lower(self, fields: TokensFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
