"""Plain floating-point weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.hub.bases.values import Values, dense_values
from adapterkit.hub.conv1d import is_conv1d
from adapterkit.hub.tensors import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def claims(module: nn.Module) -> bool:
    return True


def _is_turned(module: nn.Module) -> bool:
    """Whether it is stored (in, out), or (rows, width)."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def method(module: nn.Module) -> str:
    return "none"


def read_weight(module: nn.Module) -> Tensor:
    layer: Any = module
    weight: Tensor = layer.weight.detach().float()
    if _is_turned(module):
        return weight.mT
    return weight


def tensors(module: nn.Module) -> dict[str, Tensor]:
    layer: Any = module
    return {"weight": layer.weight.data}


def write_weight(module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    layer: Any = module
    if _is_turned(module):
        weight = weight.mT
    return {"weight": weight.to(layer.weight.dtype).reshape(layer.weight.shape)}


def means(module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    weight = tensors["weight"].float()
    return weight.mT if _is_turned(module) else weight


def values(module: nn.Module, numbers: list[float], start: int) -> Values:
    layer: Any = module
    return dense_values(NAMES[layer.weight.dtype], numbers)


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    weight = getattr(module, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None
