"""The networks of a layer on its device: products in the layer's dtype, norms, gates and trained
scales in float32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adapterkit.hub.compose.model import weights_of
from adapterkit.hub.compose.spots import Spot
from adapterkit.hub.primitives import Bottleneck, Coupling, Fusion, Layer

MULTIPLIED = {
    Bottleneck: ("down", "up", "down_bias", "up_bias"),
    Coupling: ("F", "G"),
    Fusion: ("query", "key", "value"),
}


def settle(primitive: Layer, spot: Spot, dtype: torch.dtype | None) -> Layer:
    """dtype: of the products; None is the layer's own."""
    compute, names = dtype or _dtype(spot), MULTIPLIED[type(primitive)]
    products = {name: _moved(getattr(primitive, name), spot.device) for name in names}
    half = {name: _moved(value, spot.device, compute) for name, value in products.items()}
    fits = all(bool(torch.isfinite(t).all()) for t in _flat(half.values()))
    made: dict[str, Any] = dict(half if fits else products)  # else half precision would overflow
    for name in ("scale", "norm_before", "norm_after", "gate"):
        if hasattr(primitive, name):
            made[name] = _moved(getattr(primitive, name), spot.device)
    return replace(primitive, **made)


def _dtype(spot: Spot) -> torch.dtype:
    """Of a module with a weight, what its product is computed in; of a layer, that of its first
    parameter that is not packed."""
    if weights_of(spot.module) is not None:
        return spot.dtype
    kinds = (p.dtype for p in spot.module.parameters() if p.is_floating_point())
    return next(kinds, torch.float32)


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(each, device, dtype) for each in value)
    return value.to(device, dtype) if isinstance(value, Tensor) else value


def _flat(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from value
