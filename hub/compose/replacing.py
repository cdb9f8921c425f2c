"""Parameters of the base that are replaced: T0 + sum w (T - T0), one T at weight 1 bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.hub.compose.plan import Replacement, Rows
from adapterkit.hub.quant import format_of


def whole(base: Tensor, replacements: Sequence[Replacement]) -> Tensor:
    """The whole parameter, in T0's dtype; replaced rows count as part of it."""
    if len(replacements) == 1:
        weight, only = replacements[0]
        if weight == 1 and only.rows is None:
            return only.T.to(base.dtype)
    start = base.float()
    total = start.clone()
    for weight, new in replacements:
        index = slice(None) if new.rows is None else torch.tensor(new.rows, device=base.device)
        total[index] += weight * (new.T.float() - start[index])
    return total.to(base.dtype)


def rows(module: nn.Module, replacements: Sequence[Replacement]) -> Rows:
    """The union of all replaced rows, with their values."""
    table = stored_weight(module)
    union = sorted({row for _, new in replacements for row in new.rows or ()})
    index = torch.tensor(union, device=table.device)
    start = table[index].float()
    values = start.clone()
    alone = len(replacements) == 1
    for weight, new in replacements:
        place = torch.searchsorted(index, torch.tensor(new.rows, device=table.device))
        if alone and weight == 1:
            values[place] = new.T.float()
        else:
            values[place] += weight * (new.T.float() - start[place])
    return Rows(index, values.to(table.dtype))


def bias_shift(module: nn.Module, replacements: Sequence[Replacement]) -> Tensor:
    """sum w (T - b0): added to the output, so that the base's product stays the base's."""
    layer: Any = module
    base: Tensor = layer.bias.detach().float()
    return torch.stack([weight * (new.T.float() - base) for weight, new in replacements]).sum(0)


def stored_weight(module: nn.Module) -> Tensor:
    """The weight as the module keeps it; of a quantized one, dequantized."""
    layer: Any = module
    if is_quantized(module):
        return format_of(module).read_weight(module)
    weight: Tensor = layer.weight.detach()
    return weight


def is_quantized(module: nn.Module) -> bool:
    return format_of(module).method(module) != "none"


def shadow(module: nn.Module) -> nn.Module:
    """A second module of the same class with the same parameters, buffers and hooks by reference,
    so that one parameter can be exchanged in it; its forward is its class's own."""
    own = vars(module)
    shared = [value for value in own.values() if not isinstance(value, dict)]
    shared += [value for held in own.values() if isinstance(held, dict) for value in held.values()]
    twin = copy.deepcopy(module, {id(value): value for value in shared})
    vars(twin).pop("forward", None)
    return twin
