"""Where the rows of a module table lie on a live model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.hub.bases.spelling import Slot, Spelling
from adapterkit.hub.quant import format_of


@dataclass(frozen=True)
class Spot:
    """module: that holds the weight. parameter: its name, where it is not the module's `weight`.
    slot: the row at run time, and which part of it this is."""

    module: nn.Module
    parameter: str
    slot: Slot

    @cached_property
    def device(self) -> torch.device:
        """Of its own parameters, else of those inside it."""
        for recurse in (False, True):
            for parameter in self.module.parameters(recurse=recurse):
                return parameter.device
        return torch.device("cpu")

    @cached_property
    def dtype(self) -> torch.dtype:
        """What products with it are computed in; for those of small factors float32 where the
        processor has none in half precision, which take 5 to 20 times as long there."""
        found: torch.dtype | None
        if self.parameter:
            found = getattr(self.module, self.parameter).dtype
        else:
            found = format_of(self.module).compute_dtype(self.module)
        if found is None or (self.device.type == "cpu" and not _multiplies(found)):
            return torch.float32
        return found

    def weight(self) -> Tensor:
        """float32, (out, in); (experts, out, in) of a fused parameter as a whole."""
        if not self.parameter:
            weight = format_of(self.module).read_weight(self.module)
            return weight.flatten(1) if weight.ndim > 2 else weight
        layer: Any = self.module
        whole: Tensor = getattr(layer, self.parameter).detach()
        if getattr(layer, "is_transposed", False):
            whole = whole.mT
        if self.slot.expert is None:
            return whole.float()
        return whole[self.slot.expert, self.slot.start : self.slot.stop].float()


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has products of this precision; torch emulates them below AVX-512."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return not is_half or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")


@dataclass(frozen=True)
class Spots:
    modules: Mapping[str, nn.Module]
    spelling: Spelling
    _found: dict[str, Spot] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Spot:
        if name not in self._found:
            slot = self.spelling.slot(name)
            owner, parameter = owner_of(self.modules, slot.module)
            self._found[name] = Spot(self.modules[owner], parameter, slot)
        return self._found[name]


def owner_of(modules: Mapping[str, nn.Module], row: str) -> tuple[str, str]:
    """(module, name of its parameter); "" where the row is the module itself."""
    if row in modules:
        return row, ""
    owner, _, parameter = row.rpartition(".")
    return owner, parameter
