"""Parameters of like adapters, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkit.registry.errors import InvalidError


def shares(weights: Sequence[float]) -> list[float]:
    """The weights made to add up to 1."""
    whole = math.fsum(weights)
    if whole == 0:
        raise InvalidError("weights that add up to 0 have no average")
    return [weight / whole for weight in weights]


def total(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w_k t_k, float64."""
    parts = [weight * tensor.double() for tensor, weight in zip(tensors, weights, strict=True)]
    return torch.stack(parts).sum(0)
