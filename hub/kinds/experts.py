"""LoRA on the fused weights of all experts, W_e' = W_e + s B_e A_e: the factors of all experts lie
in one pair, A (experts r, in), the expert slow, and B (out, r experts), the expert fast.

peft 0.21 `tuners/lora/layer.py`, ParamWrapper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.bases.base import Module
from adapterkit.hub.fields import LoraFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds.base import Expected

if TYPE_CHECKING:
    from torch import Tensor

A, B = ROLES = ("experts_A", "experts_B")


def expected(fields: LoraFields, module: Module, held: Mapping[str, Stored]) -> dict[str, Expected]:
    """Shapes by role; of the transpose, if that is what an older file holds."""
    rank, ends = fields.rank_of(module.name) * module.shape[0], (module.n_in, module.n_out)
    if _is_transposed(fields, module, held):
        ends = ends[::-1]
    return {A: Expected((rank, ends[0])), B: Expected((ends[1], rank))}


def _is_transposed(fields: LoraFields, module: Module, held: Mapping[str, Stored]) -> bool:
    shapes = [held[role].shape for role in ROLES if role in held]
    rank = fields.rank_of(module.name) * module.shape[0]
    other = [(rank, module.n_out), (module.n_in, rank)]
    return fields.transposed_experts and module.n_in != module.n_out and shapes == other


def undecided(fields: LoraFields, module: Module) -> list[Finding]:
    """What an older file does not say of a square weight."""
    if not fields.transposed_experts or module.n_in != module.n_out:
        return []
    want = "peft_version 0.19.1 or newer, as the weight is square"
    about = "an older one, whose factors may be those of the transpose"
    hint = "load it in the PEFT that wrote it, and save it with a newer one"
    return [Finding(ERROR, UNSUPPORTED, module.name, want, about, hint)]


def faults(rank: int, module: str, tensors: Mapping[str, Stored]) -> list[Finding]:
    """Of a pair in itself: a half that is missing, sizes that are no multiple of the rank."""
    held = {role: tensors[role] for role in ROLES if role in tensors}
    about = "none: its pair is incomplete"
    found = [
        Finding(ERROR, "missing-tensor", module, f"a tensor {role}", about)
        for role in ROLES
        if held and role not in held
    ]
    sizes = [held[role].shape[axis] for axis, role in enumerate(ROLES) if _is_matrix(held, role)]
    if any(size % rank for size in sizes) or len(set(sizes)) > 1:
        shown = " and ".join(str(list(stored.shape)) for stored in held.values())
        want = f"r = {rank} for each expert"
        found.append(Finding(ERROR, "rank-mismatch", held[min(held)].key, want, f"shapes {shown}"))
    return found


def _is_matrix(held: Mapping[str, Stored], role: str) -> bool:
    return role in held and len(held[role].shape) == 2 and 0 not in held[role].shape


def factors(module: Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(A (experts, r, in), B (experts, out, r)) of the pair, or of that of the transpose."""
    count = module.shape[0]
    wide = a.reshape(count, -1, a.shape[1])
    tall = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    if wide.shape[-1] != module.n_in:
        return tall.mT, wide.mT
    return wide, tall
