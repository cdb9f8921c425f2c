"""LoRA on a convolution: A is a convolution of all input channels into r, B one of single places.

Of a grouped one every group of outputs has ranks of its own: B is block-diagonal, and what it adds
is no change of the module's weight, which sees the inputs of its group alone
(peft 0.21 `tuners/lora/layer.py`, _ConvNd).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.hub.bases.base import Module
from adapterkit.hub.fields import LoraFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.kinds.base import Expected

if TYPE_CHECKING:
    from torch import Tensor


def expected(fields: LoraFields, module: Module) -> dict[str, Expected]:
    """Shapes by role."""
    rank, kernel = fields.rank_of(module.name), module.shape[2:]
    ones = (1,) * len(kernel)
    shapes: dict[str, tuple[int, ...]] = {
        "A": (rank, module.shape[1] * module.groups, *kernel),
        "B": (module.n_out, rank // module.groups, *ones),
    }
    shapes |= {"magnitude": (1, module.n_out, *ones)} if fields.dora else {}
    shapes |= {"B_bias": (module.n_out,)} if fields.lora_bias else {}
    return {role: Expected(shape) for role, shape in shapes.items()}


def faults(fields: LoraFields, module: Module) -> list[Finding]:
    """What cannot be on a grouped convolution."""
    rank, groups = fields.rank_of(module.name), module.groups  # 1 of what is no convolution
    found = []
    if rank % groups:
        want = f"a multiple of its {groups} groups"
        found.append(Finding(ERROR, UNSUPPORTED, module.name, want, f"rank {rank}"))
    if fields.dora and groups > 1:
        about = f"one with {groups} groups, where what is added is no change of the weight"
        found.append(Finding(ERROR, UNSUPPORTED, module.name, "no use_dora", about))
    return found


def factors(module: Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(A (r, in k), B (out, r)) as matrices; B of a grouped one with zeros between its blocks."""
    wide, tall = a.flatten(1), b.flatten(1)
    if module.groups == 1:
        return wide, tall
    rows, columns = len(tall) // module.groups, tall.shape[1]
    whole = tall.new_zeros(module.groups, rows, module.groups, columns)
    for group in range(module.groups):
        whole[group, :, group] = tall[group * rows : (group + 1) * rows]
    return wide, whole.reshape(len(tall), -1)
