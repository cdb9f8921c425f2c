"""Gains of one module as one.

Attached together, IA3s are multiplied: y = prod (1 + w_k (l_k - 1)) (W x + b).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Weighted = Sequence[tuple[Tensor, float]]


def product(gains: Weighted) -> Tensor:
    """prod (1 + w_k (l_k - 1)), float64; a single gain at weight 1 is itself bit for bit."""
    factors = [gain if weight == 1 else 1 + weight * (gain - 1) for gain, weight in gains]
    return torch.stack(factors).prod(0)


def mean(gains: Weighted) -> Tensor:
    """1 + sum w_k (l_k - 1): the weighted sum of the changes diag(l_k - 1) W."""
    if len(gains) == 1 and gains[0][1] == 1:
        return gains[0][0]
    return 1 + torch.stack([weight * (gain - 1) for gain, weight in gains]).sum(0)


def linear(gains: Weighted) -> Tensor:
    """PEFT's add_weighted_adapter, sum w_k l_k, over those that have the module."""
    return torch.stack([weight * gain for gain, weight in gains]).sum(0)
