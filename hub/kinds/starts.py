"""What PiSSA and OLoRA take out of the base before training, W' = W - W0 + s B A, computed again.

PiSSA (Meng et al. 2024, arXiv:2404.02948): W0 is the best approximation of rank r. OLoRA
(Buyukakyuz 2024, arXiv:2406.01775): W0 = s Q_r R_r of W = Q R. Both are unique, whatever the signs
that a library gives the factors, if what decides is far enough from a tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.bases.base import CONV1D, EMBEDDING, LINEAR, Module
from adapterkit.hub.fields import LoraFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.kinds.base import Lowered, Site
from adapterkit.hub.primitives import LowRank
from adapterkit.registry.errors import MismatchError

if TYPE_CHECKING:
    from torch import Tensor

PISSA, OLORA, GIVEN = "pissa", "olora", "given"
A, B = "start_A", "start_B"
# Modules it acts on; an embedding starts as in plain LoRA.
TYPES = {PISSA: (LINEAR, CONV1D), OLORA: (LINEAR,), GIVEN: (LINEAR, CONV1D)}
# Of the smallest singular value kept, and of the largest column: below it float32 does not decide.
CLEAR = 1e-4


def words(fields: LoraFields) -> dict[str, bool]:
    """Names of variants -> whether it is one."""
    names = {PISSA: "PiSSA", OLORA: "OLoRA", GIVEN: "LoRA less its start"}
    return {name: fields.start == start for start, name in names.items()}


def faults(fields: LoraFields, module: Module) -> list[Finding]:
    if not fields.start or module.type in (*TYPES[fields.start], EMBEDDING):
        return []
    want, about = f"one of {', '.join(TYPES[fields.start])}", f"a {module.type} module"
    return [Finding(ERROR, UNSUPPORTED, module.name, f"{want} for {fields.start}", about)]


def expected(fields: LoraFields, module: Module) -> dict[str, tuple[int, ...]]:
    """Shapes by role of a start that the file holds."""
    rank = fields.rank_of(module.name)
    if fields.start != GIVEN or module.type not in TYPES[GIVEN]:
        return {}
    return {A: (rank, module.n_in), B: (module.n_out, rank)}


def lower(fields: LoraFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
    module = site.module
    rank, scale = fields.rank_of(module.name), fields.scaling(module.name)
    if A in p and B in p:
        yield module.name, LowRank(-p[B], p[A], scale)
    elif fields.start and module.type != EMBEDDING:
        b, a = taken(fields.start, module, site.weight(), rank, scale)
        yield module.name, LowRank(-b, a)


def taken(start: str, module: Module, w: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(B, A) of W0 = B A, float32.  w (out, in).

    Raises MismatchError where rounding decides what it is.
    """
    import torch

    exact = torch.as_tensor(w).double()
    if start == OLORA:
        q, r = torch.linalg.qr(exact)
        sizes = r.diagonal()[:rank].abs()
        _require(module, float(sizes.min()), CLEAR * float(sizes.max()), "its first columns")
        return (scale * q[:, :rank]).float(), r[:rank].float()
    u, s, v = torch.linalg.svd(exact, full_matrices=False)
    kept, next_ = s[:rank], s[rank : rank + 1]
    gap = float(kept[-1] - next_[0]) if len(next_) else 1.0
    bound = CLEAR * float(kept[-1]) if len(next_) else 0.0
    _require(module, gap, bound, f"singular values {rank} and {rank + 1}")
    root = kept.sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()


def _require(module: Module, found: float, bound: float, what: str) -> None:
    if found <= bound:
        raise MismatchError(
            f"{module.name}: what the adapter took out of its weight cannot be told, as {what} are"
            " too close to a tie",
            hint="convert it where it was trained: path_initial_model_for_weight_conversion",
        )
