"""Weights of a checkpoint, as stored or as they would be once loaded in 4 or 8 bits. No model.

Formats: `bases.packed`. What a quantized load makes of a dense weight is bitsandbytes' own result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapterkit.hub.bases.base import CONV, CONV1D, EMBEDDING, EXPERTS, LINEAR, Base, Module
from adapterkit.hub.bases.packed import State, scales_of, state_of
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import FLOATS, Stored
from adapterkit.hub.tensors import read_tensor
from adapterkit.registry.errors import DamagedError, MismatchError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Weights:
    """The weights of a base, one read at a time.

    quantization: nf4, fp4 or int8 for what a dense base becomes when it is loaded so; as stored
    when None.
    """

    def __init__(self, base: Base, quantization: str | None = None) -> None:
        self._base, self._quantization = base, quantization

    def over(self, base: Base) -> Weights:
        """The same under other names of the modules."""
        return Weights(base, self._quantization)

    def weight(self, name: str) -> Tensor:
        """(out, in) as it is applied, float32; the transposed table of an embedding.

        Raises MismatchError if the checkpoint has none."""
        module = self._base.modules[name]
        other = module.tied_to if module.tied_to and not module.weight else name
        held = self._base.modules[other]
        if len(held.weight) != 1 or module.type == EXPERTS:
            raise MismatchError(f"{clean(self._base.name)} has no single weight of {clean(name)}")
        found = read_stored(self._base.tensors, held.weight[0])
        if module.type in (CONV1D, EMBEDDING):
            found = found.mT
        elif module.type == CONV:
            found = found.flatten(1)
        if self._is_quantized_at_load(module):  # a Conv1D as the linear layer it becomes
            found = _requantized(found, self._quantization or "")
        return found.float()

    def bias(self, name: str) -> Tensor | None:
        """(out), float32; None where the module has none. Raises MismatchError for one that the
        model has and the checkpoint lacks."""
        key = self._base.modules[name].bias
        if key == "":
            raise MismatchError(f"{clean(self._base.name)} has no bias of {clean(name)}")
        return None if key is None else read_stored(self._base.tensors, key).float()

    def _is_quantized_at_load(self, module: Module) -> bool:
        """transformers quantizes the linear layers inside the body, not the head."""
        stored = self._base.quantization.method
        if self._quantization in (None, "none", stored):
            return False
        return module.type in (LINEAR, CONV1D) and "." in module.name and module.tied_to is None


def read_stored(tensors: Mapping[str, Stored], name: str) -> Tensor:
    """A tensor of a checkpoint, dequantized, in its logical shape."""
    state = state_of(tensors, name)
    if state is not None:
        return _four_bits(tensors, name, state)
    scales = scales_of(tensors, name)
    if scales is not None:
        rows: Tensor = read_tensor(scales)[:, None] / 127
        return read_tensor(tensors[name]).float() * rows
    if tensors[name].dtype not in FLOATS:
        raise DamagedError(f"{clean(name)} is {tensors[name]}, expected a floating-point weight")
    return read_tensor(tensors[name])


def _four_bits(tensors: Mapping[str, Stored], name: str, state: State) -> Tensor:
    """Rounded to the dtype that bitsandbytes dequantizes to."""
    count = 1
    for size in state.shape:
        count *= size
    packed = read_tensor(tensors[name]).view(torch.uint8).flatten()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:count].int()
    values = read_tensor(tensors[name + ".quant_map"])[codes]
    scales = _scales(tensors, name, state).repeat_interleave(state.block_size)[:count]
    dtype = DTYPES.get(state.dtype, torch.float32)
    return (values * scales).reshape(state.shape).to(dtype)


def _scales(tensors: Mapping[str, Stored], name: str, state: State) -> Tensor:
    """absmax of each block, (blocks)."""
    absmax = read_tensor(tensors[name + ".absmax"]).flatten()
    if state.nested is None:
        return absmax
    size, offset = state.nested
    outer = read_tensor(tensors[name + ".nested_absmax"]).repeat_interleave(size)[: len(absmax)]
    table = read_tensor(tensors[name + ".nested_quant_map"])
    found: Tensor = table[absmax.view(torch.uint8).int()] * outer + offset
    return found


def _requantized(dense: Tensor, method: str) -> Tensor:
    """dequantize(quantize(W)), double quantization as `load` uses it."""
    from bitsandbytes import functional

    if method == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(dense.half())
        dequantized: Tensor = codes.float() * (scales.float()[:, None] / 127)
        return dequantized
    codes, state = functional.quantize_4bit(
        dense.contiguous(), compress_statistics=True, quant_type=method
    )
    found: Tensor = functional.dequantize_4bit(codes, state)
    return found
