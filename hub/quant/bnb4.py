"""bitsandbytes 4-bit (NF4, FP4).  Dettmers et al. 2023, arXiv:2305.14314."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from adapterkit.hub.bases.values import Values, block_values
from adapterkit.registry.errors import MismatchError


def claims(module: nn.Module) -> bool:
    return isinstance(module, bitsandbytes.nn.Linear4bit)


def method(module: nn.Module) -> str:
    layer: Any = module
    return str(layer.weight.quant_type)


def is_repacked(module: nn.Module) -> bool:
    """Whether the codes lie in the layout of the AVX512-BF16 kernel, which alone reads it."""
    layer: Any = module
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def keep_unpacked(module: nn.Module) -> None:
    """Stops the module from repacking its codes at its first forward on such a CPU: the repacked
    form has lost the exact scales."""
    layer: Any = module
    layer.support_avx512bf16_for_cpu = False


def read_weight(module: nn.Module) -> Tensor:
    """Raises MismatchError if the weight was repacked: its exact values are gone."""
    if is_repacked(module):
        raise MismatchError(
            "its 4-bit weight was repacked for this CPU by an earlier forward, which is lossy",
            hint="load the base with adapterkit.hub.load, or attach before the first forward",
        )
    layer: Any = module
    codes, state = layer.weight.data, layer.weight.quant_state
    weight: Tensor = bitsandbytes.functional.dequantize_4bit(codes, state).float()
    return weight


def requantized(module: nn.Module, dense: Tensor) -> Tensor:
    """What the module's weight was before it was repacked, from the dense weight it was made of."""
    layer: Any = module
    weight, state = layer.weight, layer.weight.quant_state
    codes, again = bitsandbytes.functional.quantize_4bit(
        dense.to(weight.device, state.dtype),
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
    )
    found: Tensor = bitsandbytes.functional.dequantize_4bit(codes, again).float()
    return found


def tensors(module: nn.Module) -> dict[str, Tensor]:
    layer: Any = module
    return {"codes": layer.weight.data, **_scales(layer.weight.quant_state)}


def _scales(state: Any) -> dict[str, Tensor]:
    found = {"absmax": state.absmax}
    if state.nested:
        found |= {"offset": state.offset, "nested_absmax": state.state2.absmax}
    return found


def write_weight(module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    layer: Any = module
    codes, state = _quantized(layer.weight, weight)
    return {"codes": codes.reshape(layer.weight.data.shape), **_scales(state)}


def _quantized(held: Any, weight: Tensor) -> tuple[Tensor, Any]:
    found: tuple[Tensor, Any] = bitsandbytes.functional.quantize_4bit(
        weight.contiguous().to(held.device),
        blocksize=held.blocksize,
        compress_statistics=held.compress_statistics,
        quant_type=held.quant_type,
        quant_storage=held.data.dtype,
    )
    return found


def means(module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    layer: Any = module
    state = copy.copy(layer.weight.quant_state)
    state.absmax = tensors["absmax"]
    if state.nested:
        state.state2 = copy.copy(state.state2)
        state.offset, state.state2.absmax = tensors["offset"], tensors["nested_absmax"]
    found: Tensor = bitsandbytes.functional.dequantize_4bit(tensors["codes"], state)
    return found.float()


def values(module: nn.Module, numbers: list[float], start: int) -> Values:
    """The blocks' scales are read off the numbers; where they are quantized themselves, they can
    be off by half of the widest gap of their code."""
    layer: Any = module
    state = layer.weight.quant_state
    error = 0.0
    if state.nested:
        gaps = state.state2.code.sort().values.diff()
        error = float(gaps.max() / 2 * state.state2.absmax.abs().max())
    return block_values(state.quant_type, numbers, error=error)


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    layer: Any = module
    dtype: torch.dtype | None = layer.compute_dtype
    return dtype
