"""Stored bytes -> torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from adapterkit.hub.headers import Stored

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensor(stored: Stored) -> Tensor:
    """The tensor in its own dtype and shape, on the CPU, its bytes owned by nobody else."""
    data = bytearray(stored.read())
    if not data:
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).reshape(stored.shape)
