"""BitFit: biases of the base trained alone, and a head.  Ben Zaken et al., arXiv:2106.10199."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import LINEAR, Module
from adapterkit.hub.fields import BitfitFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.primitives import BiasShift

if TYPE_CHECKING:
    from torch import Tensor

BIAS, WEIGHT, SHIFT = "replace.bias", "replace.weight", "shift"


class Bitfit:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("BitFit")

    def problems(self, adapter: Adapter) -> list[Finding]:
        form = {BIAS: (None,), SHIFT: (None,)}
        return [
            fault
            for (_, role), stored in adapter.tensors.items()
            for fault in targeted.form_faults(stored, form.get(role))
        ]

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        """What the file holds, and what the config says that it holds."""
        fields: BitfitFields = adapter.fields
        tensors: dict[tuple[str, str], Expected] = {}
        findings = []
        for (name, role), stored in adapter.tensors.items():
            module = modules.get(name)
            if module is None:
                continue
            if module.bias is None and role != WEIGHT and not _extends(fields, module, role):
                findings.append(_without_bias(module, stored))
            shape = replaced.stored_shape(module) if role == WEIGHT else (module.n_out,)
            tensors[name, role] = Expected(shape)
        heads = [name for name, role in adapter.tensors if role == WEIGHT]
        tensors |= _declared(fields, modules) | _biases(heads, modules)
        return Schema(tensors, tuple(findings))

    def lower(self, fields: BitfitFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        name = site.module.name
        if BIAS in p and site.module.bias is None:
            yield name, BiasShift(p[BIAS])
        else:
            yield from replaced.lower(fields.replaced, site, p)
        if SHIFT in p:
            yield name, BiasShift(p[SHIFT])


def _extends(fields: BitfitFields, module: Module, role: str) -> bool:
    """Whether the trainer gave a bias to what has none."""
    return fields.extends and (module.type == LINEAR or role == SHIFT)


def _without_bias(module: Module, stored: Stored) -> Finding:
    about = f"the {module.type} module {module.name} has no bias"
    return Finding(ERROR, UNSUPPORTED, stored.key, "a module with a bias", about)


def _declared(
    fields: BitfitFields, modules: Mapping[str, Module]
) -> dict[tuple[str, str], Expected]:
    excluded = {module.name for module in _inside(fields.exclude, modules)}
    found = {
        (module.name, BIAS): Expected((module.n_out,))
        for module in _inside(fields.modules, modules)
        if module.type == LINEAR and module.name not in excluded
    }
    for module in _inside(fields.whole, modules):
        found[module.name, WEIGHT] = Expected(replaced.stored_shape(module))
        found |= _biases([module.name], modules)
    return found


def _biases(
    names: Iterable[str], modules: Mapping[str, Module]
) -> dict[tuple[str, str], Expected]:
    """Of modules that are replaced as a whole."""
    rows = [modules[name] for name in names if name in modules]
    return {(row.name, BIAS): Expected((row.n_out,)) for row in rows if row.bias is not None}


def _inside(ends: Iterable[str], modules: Mapping[str, Module]) -> Iterator[Module]:
    """Modules that end with one of these names, or lie in one that does."""
    for name, module in modules.items():
        if any(f".{end}." in f".{name}." for end in ends):
            yield module
