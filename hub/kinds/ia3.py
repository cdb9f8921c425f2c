"""IA3, y = l * (W x + b), and in feed-forward layers y = W (l * x) + b.

Liu et al. 2022, arXiv:2205.05638.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV1D, LINEAR, Module
from adapterkit.hub.fields import Ia3Fields
from adapterkit.hub.findings import ERROR, Finding, clean
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import IN, OUT, Form, Rules, Tensors
from adapterkit.hub.matching import Patterns
from adapterkit.hub.primitives import InputGain, OutputGain

if TYPE_CHECKING:
    from torch import Tensor

ROLES, TYPES = frozenset({"gain"}), (LINEAR, CONV1D)


class Ia3:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("IA3")

    def problems(self, adapter: Adapter) -> list[Finding]:
        found = targeted.problems(adapter, Rules(ROLES, TYPES, _stored_form))
        patterns = Patterns()
        for (module, role), stored in adapter.tensors.items():
            if role == "gain":
                found += _contradiction(adapter.fields, module, stored, patterns)
        return found

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        form = partial(_form, adapter.fields, Patterns())
        return targeted.schema(adapter, modules, Rules(ROLES, TYPES, form))

    def lower(self, fields: Ia3Fields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "gain" in p:
            name, gain = site.module.name, p["gain"]
            said = fields.scales_input(name, Patterns())
            inputs = gain.shape[0] == 1 if said is None else said
            yield name, (InputGain if inputs else OutputGain)(gain.reshape(-1))


def _stored_form(module: str, tensors: Tensors) -> Form:
    """A row scales inputs, a column outputs."""
    is_row = "gain" in tensors and tensors["gain"].shape[:1] == (1,)
    return {"gain": (1, IN) if is_row else (OUT, 1)}


def _form(fields: Ia3Fields, patterns: Patterns, module: str, tensors: Tensors) -> Form:
    said = fields.scales_input(module, patterns)
    if said is None:
        return _stored_form(module, tensors)
    return {"gain": (1, IN) if said else (OUT, 1)}


def _contradiction(
    fields: Ia3Fields, module: str, stored: Stored, patterns: Patterns
) -> list[Finding]:
    """The shape and the config say which of the two it is, and have to say the same."""
    said = fields.scales_input(module, patterns)
    if said is None or len(stored.shape) != 2 or 1 not in stored.shape:
        return []
    if stored.shape[0 if said else 1] == 1:
        return []
    form, verb = ("[1, in]", "means") if said else ("[out, 1]", "does not mean")
    given = fields.feedforward
    listed = clean(str(list(given) if isinstance(given, tuple) else given), 120)
    want = f"shape {form}, as feedforward_modules {listed} {verb} {clean(module)}"
    return [Finding(ERROR, "shape-mismatch", stored.key, want, f"shape {list(stored.shape)}")]
