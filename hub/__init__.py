"""What adapters mean: read, check, attach, load. Names are imported on first use."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.hub.adapter import Adapter, AdapterInfo
    from adapterkit.hub.check import check, exit_code
    from adapterkit.hub.compose.attach import Adapters, attach, attached
    from adapterkit.hub.describe import describe
    from adapterkit.hub.diff import Diff, diff
    from adapterkit.hub.findings import Finding, Report
    from adapterkit.hub.load import load
    from adapterkit.hub.locate import folder

PLACES = {
    "Adapter": "adapterkit.hub.adapter",
    "AdapterInfo": "adapterkit.hub.adapter",
    "Adapters": "adapterkit.hub.compose.attach",
    "Diff": "adapterkit.hub.diff",
    "Finding": "adapterkit.hub.findings",
    "Report": "adapterkit.hub.findings",
    "attach": "adapterkit.hub.compose.attach",
    "attached": "adapterkit.hub.compose.attach",
    "check": "adapterkit.hub.check",
    "describe": "adapterkit.hub.describe",
    "diff": "adapterkit.hub.diff",
    "exit_code": "adapterkit.hub.check",
    "folder": "adapterkit.hub.locate",
    "load": "adapterkit.hub.load",
}

__all__ = [
    "Adapter",
    "AdapterInfo",
    "Adapters",
    "Diff",
    "Finding",
    "Report",
    "attach",
    "attached",
    "check",
    "describe",
    "diff",
    "exit_code",
    "folder",
    "load",
]


class _Hub(ModuleType):
    """Keeps `hub.check` the function: the import system would bind the submodule of that name."""

    def __getattr__(self, name: str) -> Any:
        if name not in PLACES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(PLACES[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Hub
