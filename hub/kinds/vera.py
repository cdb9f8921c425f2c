"""VeRA, W' = W + diag(b) B diag(d) A with A and B the same for all modules, cut to size.

Kopiczko et al. 2023, arXiv:2310.11454.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV1D, LINEAR, Module
from adapterkit.hub.fields import VeraFields
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import LowRank

if TYPE_CHECKING:
    from torch import Tensor

ROLES, TYPES = frozenset({"lambda_b", "lambda_d"}), (LINEAR, CONV1D)
# Of the whole adapter, not of a module.
A, B = "shared_A", "shared_B"


class Vera:
    def summary(self, adapter: Adapter) -> Summary:
        names = [name for name, held in adapter.modules.items() if ROLES & held.keys()]
        return Summary("VeRA", (adapter.fields.rank,) * len(names))

    def problems(self, adapter: Adapter) -> list[Finding]:
        found = targeted.problems(adapter, _rules(adapter.fields))
        return found + list(_shared_faults(adapter))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        fields: VeraFields = adapter.fields
        found = targeted.schema(adapter, modules, _rules(fields))
        targets = [modules[name] for name, role in found.tensors if role == "lambda_b"]
        n_in = max((module.n_in for module in targets), default=0)
        n_out = max((module.n_out for module in targets), default=0)
        if not fields.saved:
            return replace(found, shared=partial(_projections, fields, n_in, n_out))
        shapes = {A: (fields.rank, n_in), B: (n_out, fields.rank)}
        whole = {("", role): Expected(shape, required=False) for role, shape in shapes.items()}
        return replace(found, tensors=found.tensors | whole)  # their absence is said by `problems`

    def lower(self, fields: VeraFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "lambda_b" not in p:
            return
        module, a, b = site.module, site.shared[A], site.shared[B]
        yield (
            module.name,
            LowRank(
                b[: module.n_out],
                a[:, : module.n_in],
                out_scale=p["lambda_b"],
                rank_scale=p["lambda_d"],
            ),
        )


def _rules(fields: VeraFields) -> Rules:
    def form(module: str, tensors: Tensors) -> Form:
        return {"lambda_b": (OUT,), "lambda_d": (fields.rank,)}

    return Rules(ROLES, TYPES, form)


def _shared_faults(adapter: Adapter) -> Iterator[Finding]:
    fields: VeraFields = adapter.fields
    for role, axis in ((A, 0), (B, 1)):
        stored = adapter.shared.get(role)
        if stored is None:
            if fields.saved:
                about = "none, though save_projection is true"
                yield Finding(ERROR, "missing-tensor", role, "a projection for all modules", about)
        elif not fields.saved:
            about = "a projection, though save_projection is false"
            yield Finding(ERROR, "unexpected-tensor", stored.key, "no projection", about)
        elif len(stored.shape) != 2 or stored.shape[axis] != fields.rank:
            shape = f"shape {list(stored.shape)}"
            want = f"two dimensions, {fields.rank} for number {axis}"
            yield Finding(ERROR, "shape-mismatch", stored.key, want, shape)
        else:
            yield from targeted.form_faults(stored, (None, None))


def _projections(fields: VeraFields, n_in: int, n_out: int) -> dict[str, Tensor]:
    """A (r, n_in) and B (n_out, r), drawn as PEFT draws them: Kaiming uniform, A first, on the CPU
    (peft 0.21 `tuners/vera/model.py`)."""
    import torch

    draw = torch.Generator(device="cpu").manual_seed(fields.seed)

    def uniform(n_rows: int, n_columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(n_columns))
        return torch.empty(n_rows, n_columns).uniform_(-bound, bound, generator=draw)

    first = uniform(fields.rank, n_in)
    return {A: first, B: uniform(n_out, fields.rank)}
