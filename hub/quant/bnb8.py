"""bitsandbytes 8-bit, W = codes * SCB / 127 by row.  Dettmers et al. 2022, arXiv:2208.07339."""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes
import torch
from torch import Tensor, nn

from adapterkit.hub.bases.values import Values, row_values


def claims(module: nn.Module) -> bool:
    return isinstance(module, bitsandbytes.nn.Linear8bitLt)


def method(module: nn.Module) -> str:
    return "int8"


def read_weight(module: nn.Module) -> Tensor:
    layer: Any = module
    if layer.weight.is_floating_point():  # not quantized until it moves to its device
        return cast(Tensor, layer.weight.detach().float())
    codes, scales = layer.weight.data, layer.weight.SCB
    if scales is None:  # the first forward moves them to the module's state
        codes, scales = layer.state.CB, layer.state.SCB
    weight: Tensor = codes.float() * (scales.float()[:, None] / 127)
    return weight


def values(module: nn.Module, numbers: list[float], start: int) -> Values:
    layer: Any = module
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    rows = range(start, start + len(numbers))
    return row_values(numbers, [float(scales[place // layer.in_features]) for place in rows])


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    return None
