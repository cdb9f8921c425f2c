"""How a live module stores its weight: one file per format, one row each. Kinds do not know it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from adapterkit.hub.bases.values import Values


class Format(Protocol):
    """A weight format, as a file of this folder."""

    def claims(self, module: nn.Module) -> bool: ...

    def method(self, module: nn.Module) -> str:
        """`nf4`, `fp4`, `int8` or `none`."""
        ...

    def read_weight(self, module: nn.Module) -> Tensor:
        """The weight, dequantized, float32, (out, in) as it is applied; on the module's device."""
        ...

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """All that the weight is made of, by reference: copied into, the module has another."""
        ...

    def write_weight(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        """What `tensors` would have to hold for this weight, (out, in) float32. Changes nothing."""
        ...

    def means(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight, (out, in) float32, that such tensors stand for."""
        ...

    def values(self, module: nn.Module, numbers: list[float], start: int) -> Values:
        """Dequantized values from position `start` of the flattened weight, each with the interval
        it stands for."""
        ...

    def compute_dtype(self, module: nn.Module) -> torch.dtype | None:
        """What the product is computed in; None where the model's dtype decides."""
        ...


# name -> (library that must be loaded for such a module to exist, file); the first that claims it
FORMATS = {
    "bnb4": ("bitsandbytes", "adapterkit.hub.quant.bnb4"),
    "bnb8": ("bitsandbytes", "adapterkit.hub.quant.bnb8"),
    "dense": ("torch", "adapterkit.hub.quant.dense"),
}


def format_of(module: nn.Module) -> Format:
    """The format of a module's weight; dense when no other claims it."""
    for library, path in FORMATS.values():
        if library in sys.modules:
            found: Format = import_module(path)
            if found.claims(module):
                return found
    raise LookupError("dense claims every module")
