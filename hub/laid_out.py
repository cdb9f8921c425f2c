"""How PEFT's LoRA lays out the factors of each type of module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from adapterkit.hub.bases.base import EMBEDDING, EXPERTS
from adapterkit.hub.findings import clean
from adapterkit.hub.formats.peft_write import Part, Place
from adapterkit.hub.offline import Ground
from adapterkit.hub.primitives import LowRank, Primitive
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    import torch

    from adapterkit.hub.blend.factors import Factors


def by_expert(
    name: str, made: Sequence[Primitive]
) -> Iterator[tuple[str, Sequence[Primitive]]]:
    """The primitives of each matrix in a fused weight of experts; of any other module, its own."""
    fused = [p for p in made if isinstance(p, LowRank) and p.B.ndim == 3]
    if not fused or len(fused) < len(made):
        yield name, made
        return
    for expert in range(len(fused[0].B)):
        yield f"{name}[{expert}]", [LowRank(p.B[expert], p.A[expert], p.scale) for p in fused]


def grouped(pairs: Mapping[str, Factors]) -> dict[str, list[tuple[str, Factors]]]:
    """Module -> its label and factors, or those of its experts in order."""
    found: dict[str, list[tuple[str, Factors]]] = {}
    for label, factors in pairs.items():
        found.setdefault(label.partition("[")[0], []).append((label, factors))
    return found


def roles(ground: Ground, name: str) -> tuple[str, str]:
    embedding = ground.module(name).type == EMBEDDING
    return ("embedding_A", "embedding_B") if embedding else ("A", "B")


def shaped(ground: Ground, name: str, a: Part, b: Part) -> tuple[Part, Part]:
    """Of a convolution A is one into r channels, and B one of single places."""
    kernel = ground.kernel(name)
    if not kernel:
        return a, b
    wide = (a.shape[0], a.shape[1] // prod(kernel), *kernel)
    return replace(a, shape=wide), replace(b, shape=(*b.shape, *(1 for _ in kernel)))


def biases(
    ground: Ground, pairs: Mapping[str, Factors], shifts: Mapping[str, torch.Tensor], dtype: str
) -> dict[Place, Part]:
    """PEFT's `lora_bias` is for all modules or none: those without a shift get zeros."""
    from adapterkit.hub.factored import vector

    kinds = {name: ground.module(name).type for name in grouped(pairs)}
    odd = [name for name, type_ in kinds.items() if type_ in (EMBEDDING, EXPERTS)]
    if odd:
        raise InvalidError(
            f"{clean(ground.adapter.name)} shifts biases and changes {clean(odd[0])}, an"
            f" {kinds[odd[0]]} module: PEFT's lora_bias is not for those"
        )
    return {
        (name, "B_bias"): vector(shifts.get(name), factors.shape[0], dtype)
        for name, factors in pairs.items()
    }
