"""LN tuning: weights and biases of norms, replaced.  Qi et al. 2022, arXiv:2211.08682."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import NORM, Module
from adapterkit.hub.fields import PlainFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import OUT, Form, Rules, Tensors

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, BIAS = "replace.weight", "replace.bias"


class LnTuning:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("LN tuning")

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, Rules(frozenset({WEIGHT}), (NORM,), _form))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        found = targeted.schema(adapter, modules, Rules(frozenset({WEIGHT}), (NORM,), _form))
        biases = {
            (name, BIAS): Expected((modules[name].n_out,))
            for name, role in found.tensors
            if role == WEIGHT and modules[name].bias is not None
        }
        return Schema(found.tensors | biases, found.findings)

    def lower(self, fields: PlainFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)


def _form(module: str, tensors: Tensors) -> Form:
    return {WEIGHT: (OUT,)}
