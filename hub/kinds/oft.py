"""OFT, y = W (x R) + b: each run of inputs is turned by an orthogonal block R before the product.

Qiu et al. 2023, arXiv:2306.07280; the series for the Cayley transform: Qiu et al. 2025,
arXiv:2506.19847.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import LINEAR, Module
from adapterkit.hub.fields import OftFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import Form, Rules
from adapterkit.hub.primitives import InputRotation

if TYPE_CHECKING:
    from torch import Tensor

TYPES = (LINEAR,)
# role -> why it is recognised and not applied
REFUSED = {
    "old_rotation": "whole blocks, which PEFT up to 0.15 stored and read in another orientation",
    "embedding_rotation": "a rotation of the rows of an embedding",
}


class Oft:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("OFT" if adapter.fields.limit is None else "COFT")

    def problems(self, adapter: Adapter) -> list[Finding]:
        fields: OftFields = adapter.fields
        found = [
            Finding(ERROR, UNSUPPORTED, stored.key, "the entries of skew blocks", REFUSED[role])
            for (_, role), stored in adapter.tensors.items()
            if role in REFUSED
        ]
        if found:
            return found
        form: Form = {"rotation": (1 if fields.shared else None, None)}
        found = targeted.problems(adapter, Rules(frozenset(form), TYPES, lambda *_: form))
        for (_, role), stored in adapter.tensors.items():
            found += _odd_columns(stored) if role == "rotation" else []
        return found

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        fields: OftFields = adapter.fields
        names = adapter.targets.select(modules)
        usable = [modules[name] for name in names if modules[name].type in TYPES]
        others = [modules[name] for name in names if modules[name].type not in TYPES]
        tensors = {(m.name, "rotation"): Expected(_shape(fields, m.n_in)) for m in usable}
        findings = [targeted.unsupported(module, TYPES) for module in others]
        findings += targeted.unmatched(adapter, modules, names)
        rest = replaced.schema(adapter, fields.replaced, modules, names)
        return Schema(rest.tensors | tensors, (*findings, *rest.findings))

    def lower(self, fields: OftFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "rotation" in p:
            yield site.module.name, InputRotation(blocks(fields, p["rotation"]))


def blocks(fields: OftFields, entries: Tensor) -> Tensor:
    """R (n, b, b), float32, of the entries (n, b (b - 1) / 2) above the diagonals of skew Q."""
    import torch

    q = _skew(torch.as_tensor(entries).double())
    if fields.limit is not None:  # COFT clips in the forward too
        limit = fields.limit / len(q) ** 0.5
        norms = q.norm(dim=(1, 2), keepdim=True)
        q = torch.where(norms <= limit, q, q * (limit / norms))
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    exact = fields.terms is None
    turns = torch.linalg.solve(one + q, one - q, left=False) if exact else _series(fields, one, q)
    return turns.to(torch.float32)


def _skew(entries: Tensor) -> Tensor:
    import torch

    size = _block_size(entries.shape[1])
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    q = entries.new_zeros(len(entries), size, size)
    q[:, rows, columns] = entries
    return q - q.mT


def _series(fields: OftFields, one: Tensor, q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 with -Q for Q: I + 2 Q + 2 Q^2 + ..., to the power PEFT stops at.

    Since 0.18 its last term counts once, and three terms are computed as four
    (peft 0.21 `tuners/oft/layer.py`, _cayley_batch).
    """
    terms = fields.terms or 1
    last = terms - 1 if fields.last_twice or terms < 3 else max(terms, 4) - 1
    total, power = one.expand_as(q), one
    for degree in range(1, last + 1):
        power = power @ q
        once = degree == last and terms > 2 and not fields.last_twice
        total = total + (1 if once else 2) * power
    return total


def _shape(fields: OftFields, n_in: int) -> tuple[int, int]:
    size = fields.block_size(n_in)
    return 1 if fields.shared else n_in // size, size * (size - 1) // 2


def _block_size(entries: int) -> int:
    """b, of b (b - 1) / 2 entries."""
    return (1 + isqrt(1 + 8 * entries)) // 2


def _odd_columns(stored: Stored) -> list[Finding]:
    """A number of entries that no block has."""
    if len(stored.shape) != 2 or 0 in stored.shape:
        return []
    size = _block_size(stored.shape[1])
    if size * (size - 1) // 2 == stored.shape[1]:
        return []
    want, shape = "b (b - 1) / 2 columns, for blocks of b inputs", f"shape {list(stored.shape)}"
    return [Finding(ERROR, "shape-mismatch", stored.key, want, shape)]
