"""bitsandbytes 8-bit, W = codes * SCB / 127 by row.  Dettmers et al. 2022, arXiv:2208.07339."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import bitsandbytes
import torch
from torch import Tensor, nn

from adapterkit.hub.bases.values import Values, row_values
from adapterkit.registry.errors import MismatchError


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


def tensors(module: nn.Module) -> dict[str, Tensor]:
    layer: Any = module
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return {"codes": layer.weight.data, "scales": scales}


def write_weight(module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    """Raises MismatchError for values above those of float16, from which it is made."""
    half = weight.half()
    if not torch.isfinite(half).all():
        raise MismatchError("its values are too large for float16, which int8 is made from")
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(half.contiguous())
    return {"codes": codes, "scales": scales.float()}


def means(module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["codes"].float() * (tensors["scales"].float()[:, None] / 127)


def values(module: nn.Module, numbers: list[float], start: int) -> Values:
    layer: Any = module
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    rows = range(start, start + len(numbers))
    return row_values(numbers, [float(scales[place // layer.in_features]) for place in rows])


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    return None
