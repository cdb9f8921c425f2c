"""The files a live model was loaded from, for weights that are no longer exact in memory."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import Tensor

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.headers import FLOATS
from adapterkit.hub.kinds.replaced import HEADS
from adapterkit.hub.tensors import read_tensor
from adapterkit.registry.errors import AdapterError


class Origin:
    """folder: where the model says it came from; nothing is read before a weight is asked for."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    @cached_property
    def _base(self) -> Base | None:
        if not self._folder.is_dir():
            return None
        try:
            return read_base(self._folder)
        except AdapterError:  # then there is no origin, and whoever needs it says which weight
            return None

    def brings(self, module: str) -> bool:
        """Whether the checkpoint has a weight for it. Where there is none to ask, a name that
        classification heads have counts as missing."""
        if self._base is None:
            return module.rpartition(".")[2] not in HEADS
        row = self._base.modules.get(module)
        return row is not None and bool(row.weight or row.tied_to)

    def weight(self, module: str) -> Tensor | None:
        """The dense weight of a module as the checkpoint stores it, None if it has no such one."""
        row = self._base.modules.get(module) if self._base is not None else None
        if self._base is None or row is None or len(row.weight) != 1:
            return None
        stored = self._base.tensors[row.weight[0]]
        return read_tensor(stored) if stored.dtype in FLOATS else None
