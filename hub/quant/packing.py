"""Weights in 4 and 8 bits as transformers stores them, made by bitsandbytes' own functions.

Names and meaning of the tensors: `bases.packed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.hub.bases.base import Quantization
from adapterkit.hub.bases.packed import STATE
from adapterkit.hub.tensors import DTYPES
from adapterkit.registry.errors import InvalidError

NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK, NESTED = 64, 256
# Above the bytes of any quant state.
MAX_STATE = 512
# int8 is made from float16.
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Scheme:
    """How weights are packed. double: the scales are quantized too, as `load` has them."""

    method: str
    double: bool = True
    block: int = BLOCK

    @classmethod
    def of(cls, found: Quantization) -> Scheme | None:
        """None for weights that are not quantized. What is not recorded is as `load` has it."""
        if found.method == "none":
            return None
        double = True if found.double_quant is None else found.double_quant
        return cls(found.method, double, found.block_size or BLOCK)


@dataclass(frozen=True, eq=False)
class Packed:
    """tensors: by their names in the file. values: what they dequantize to, float32."""

    tensors: dict[str, Tensor]
    values: Tensor


def pack(key: str, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Packed:
    """weight (out, in) of the tensor `key`. dtype: what it is dequantized to when it is used.

    Raises InvalidError for values that int8 cannot be made from.
    """
    if scheme.method == "int8":
        return _eight_bits(key, weight)
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(),
        blocksize=scheme.block,
        compress_statistics=scheme.double,
        quant_type=scheme.method,
    )
    state.dtype = dtype
    values: Tensor = functional.dequantize_4bit(codes, state)
    parts = {f"{key}.{part}": held for part, held in state.as_dict(packed=True).items()}
    return Packed({key: codes, **parts}, values.float())


def _eight_bits(key: str, weight: Tensor) -> Packed:
    from bitsandbytes import functional

    half = weight.half()
    if not torch.isfinite(half).all():
        raise InvalidError(f"{key} has values above {LARGEST:g}, which int8 is not made from")
    codes, scales, _ = functional.int8_vectorwise_quant(half.contiguous())
    scales = scales.float()
    stem = key.removesuffix("weight")
    tensors = {key: codes, f"{stem}SCB": scales, f"{stem}weight_format": torch.tensor(0).byte()}
    return Packed(tensors, codes.float() * (scales[:, None] / 127))


def sizes(key: str, count: int, rows: int, scheme: Scheme) -> dict[str, int]:
    """Bytes of each tensor that `pack` makes of `count` values in rows, at most."""
    if scheme.method == "int8":
        stem = key.removesuffix("weight")
        return {key: count, f"{stem}SCB": 4 * rows, f"{stem}weight_format": 1}
    blocks = -(-count // scheme.block)
    found = {key: -(-count // 2), f"{key}.absmax": 4 * blocks, f"{key}.quant_map": 64}
    found[key + STATE + scheme.method] = MAX_STATE
    if scheme.double:
        found |= {f"{key}.nested_absmax": 4 * -(-blocks // NESTED), f"{key}.nested_quant_map": 1024}
    return found
