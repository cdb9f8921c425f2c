"""What a checkpoint repeats of the base, compared with the weights in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import clean
from adapterkit.hub.frozen import ROLE
from adapterkit.hub.quant import format_of
from adapterkit.registry.errors import MismatchError

# Largest share of the norm by which a quantized weight differs from what it was made of: twice
# what was seen on normal weights.
LOSS = {"nf4": 0.2, "fp4": 0.25, "int8": 0.03}


def require_same(
    adapter: Adapter, module: str, tensors: Mapping[str, Tensor], live: nn.Module
) -> None:
    """Raises MismatchError naming each tensor that differs from the base's, but for rounding."""
    repeated = {r.removeprefix(ROLE): t for r, t in tensors.items() if r.startswith(ROLE)}
    odd = [
        clean(adapter.tensors[module, f"{ROLE}{parameter}"].key)
        for parameter, tensor in repeated.items()
        if not _is_same(live, parameter, tensor)
    ]
    if odd:
        raise MismatchError(
            f"{clean(adapter.name)} was made on other weights (other-weights): {', '.join(odd)}"
            " differ from those of the base"
        )


def _is_same(live: nn.Module, parameter: str, tensor: Tensor) -> bool:
    weights = format_of(live)
    if parameter == "weight" and (method := weights.method(live)) != "none":
        here = weights.read_weight(live)
        return float((here - tensor).norm()) <= LOSS.get(method, 0.0) * float(tensor.norm())
    value = getattr(live, parameter, None)
    if not isinstance(value, Tensor) or value.shape != tensor.shape:
        return False
    return torch.equal(tensor.to(value.dtype), value.detach())
