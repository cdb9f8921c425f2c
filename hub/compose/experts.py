"""Fused experts: each expert's weight with what is active on it, while the module's own code runs.

A twin of the module holds, in place of a fused parameter, an object that is indexed like it. The
forward of the class takes one expert after the other, so that each token meets the updates of its
own expert and no second weight is made.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterkit.hub.bases.spelling import Slot
from adapterkit.hub.compose import replacing
from adapterkit.hub.compose.plan import Sums, added, with_sums
from adapterkit.hub.primitives import DenseDelta, LowRank, Primitive, RowScale
from adapterkit.registry.errors import MismatchError

MATRIX = nn.Identity()  # that what is added to has an input (..., in) and no bias


class Matrix:
    """The weight of one expert, W with its updates: a product by it computes each on its own,
    anything else the sum. is_transposed: W is (in, out)."""

    def __init__(self, weight: Tensor, sums: Sums, is_transposed: bool) -> None:
        self.weight, self.sums, self.is_transposed = weight, sums, is_transposed

    def whole(self) -> Tensor:
        weight = self.weight.mT if self.is_transposed else self.weight
        total = (weight.float() + added(self.sums, weight.float())).to(weight.dtype)
        return total.mT if self.is_transposed else total

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = functional.linear(x, self.weight)
        found = with_sums(MATRIX, self.sums, x, y, y)
        return (found if bias is None else found + bias).to(y.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Matrix:
        """Not a tensor: `__getattr__` would give the copy of one."""
        return type(self)(copy.deepcopy(self.weight, memo), self.sums, self.is_transposed)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is functional.linear and _is_product(args):
            return args[1].times(args[0], *args[2:], **(kwargs or {}))
        return func(*map(_plain, args), **{k: _plain(v) for k, v in (kwargs or {}).items()})


class Matrices(Matrix):
    """The weights of all experts, (experts, out, in); each of them by its number."""

    def __getitem__(self, expert: Any) -> Any:
        chosen = expert.item() if isinstance(expert, Tensor) and expert.ndim == 0 else expert
        if not isinstance(chosen, int):
            return self.whole()[expert]
        held = {name: each for name, each in vars(self.sums).items() if each is not None}
        mine = {name: each[chosen] if _is_own(name, each) else each for name, each in held.items()}
        return Matrix(self.weight[chosen], Sums(**mine), self.is_transposed)


def _is_own(name: str, held: Tensor) -> bool:
    """Whether there is one for each expert; a gate may be that of all."""
    return name != "gate" or held.ndim == 2


def _is_product(args: Sequence[Any]) -> bool:
    weight = args[1] if len(args) > 1 else None
    return type(weight) is Matrix and not weight.is_transposed and isinstance(args[0], Tensor)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.whole() if isinstance(value, Matrix) else value


def twin_forward(
    module: nn.Module, sums: Mapping[str, Sums], whole: Mapping[str, Tensor]
) -> Callable[..., Any]:
    """The forward of the module's class with these updates of its parameters. whole: new values of
    some; what is added to those follows from the values they had.

    Fused ones are taken expert by expert."""
    twin = replacing.shadow(module)
    is_transposed = bool(getattr(module, "is_transposed", False))
    fused = {name for name in sums if getattr(module, name).ndim == 3 and name not in whole}
    for name in sums.keys() | whole.keys():
        parameter: Tensor = getattr(module, name)
        delattr(twin, name)
        if name in fused:  # the parameter itself: it may be moved, trained and copied
            setattr(twin, name, Matrices(parameter, sums[name], is_transposed))
            continue
        weight = parameter.detach()
        value = whole.get(name, weight)
        if name in sums:
            value = value + (Matrices(weight, sums[name], is_transposed).whole() - weight)
        setattr(twin, name, nn.Parameter(value.to(weight.dtype), requires_grad=False))
    if not fused:
        return twin.forward
    # transformers wraps it in a choice of faster ones, which take all experts at once
    forward = inspect.unwrap(type(module).forward)
    return partial(forward, twin)


def joined(
    name: str, shape: Sequence[int], parts: Sequence[tuple[Slot, Primitive]]
) -> list[Primitive]:
    """What acts on rows of single experts as updates of the fused parameter (experts, out, in).

    Raises MismatchError naming a primitive that has no such form.
    """
    for _, primitive in parts:
        if not isinstance(primitive, LowRank | RowScale | DenseDelta):
            kind = type(primitive).__name__
            raise MismatchError(f"{name}: {kind} of a single expert is not supported")
    low = [(slot, each) for slot, each in parts if isinstance(each, LowRank)]
    found: list[Primitive] = [_factors(shape, low)] if low else []
    scales = [(slot, each.g) for slot, each in parts if isinstance(each, RowScale)]
    deltas = [(slot, each.D) for slot, each in parts if isinstance(each, DenseDelta)]
    found += [RowScale(_placed(shape[:-1], scales))] if scales else []
    return found + ([DenseDelta(_placed(shape, deltas))] if deltas else [])


def _placed(shape: Sequence[int], parts: Sequence[tuple[Slot, Tensor]]) -> Tensor:
    """Zeros, but for the rows of each part."""
    total = parts[0][1].new_zeros(tuple(shape))
    for slot, values in parts:
        total[slot.expert, slot.start : slot.stop] = values
    return total


def _factors(shape: Sequence[int], parts: Sequence[tuple[Slot, LowRank]]) -> LowRank:
    """One pair of factors for every expert, side by side, as wide as the largest needs."""
    count, n_out, n_in = shape
    ranks = [0] * count
    for slot, low in parts:
        ranks[slot.expert or 0] += len(low.A)
    first = parts[0][1].A
    a, b = first.new_zeros(count, max(ranks), n_in), first.new_zeros(count, n_out, max(ranks))
    gate = first.new_zeros(count, max(ranks), dtype=torch.float32)
    filled = [0] * count
    for slot, low in parts:
        expert = slot.expert or 0
        columns = slice(filled[expert], filled[expert] + len(low.A))
        filled[expert] = columns.stop
        a[expert, columns] = low.A
        tall = low.B if low.out_scale is None else low.B * low.out_scale[:, None]
        b[expert, slot.start : slot.stop, columns] = tall
        gate[expert, columns] = low.scale
        if low.rank_scale is not None:
            gate[expert, columns] *= low.rank_scale
    return LowRank(b, a, rank_scale=gate)
