"""What adapters mean: read, check, attach, load. Names are imported on first use."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.hub.adapter import Adapter, AdapterInfo
    from adapterkit.hub.check import check, exit_code
    from adapterkit.hub.compose.attach import attach, attached
    from adapterkit.hub.compose.blocks import Average, BatchSplit, Fuse, Parallel, Split, Stack
    from adapterkit.hub.compose.handle import Adapters
    from adapterkit.hub.convert import Conversion, convert
    from adapterkit.hub.describe import describe
    from adapterkit.hub.diff import Diff, diff
    from adapterkit.hub.findings import Finding, Report
    from adapterkit.hub.load import load
    from adapterkit.hub.locate import folder
    from adapterkit.hub.merge.fidelity import Fidelity, MergeReport
    from adapterkit.hub.merge.merge import merge
    from adapterkit.hub.mixing.blend import blend
    from adapterkit.hub.mixing.compare import Comparison, compare
    from adapterkit.hub.mixing.extract import extract
    from adapterkit.hub.mixing.written import Blend

PLACES = {
    "Adapter": "adapterkit.hub.adapter",
    "AdapterInfo": "adapterkit.hub.adapter",
    "Adapters": "adapterkit.hub.compose.handle",
    "Average": "adapterkit.hub.compose.blocks",
    "BatchSplit": "adapterkit.hub.compose.blocks",
    "Blend": "adapterkit.hub.mixing.written",
    "Comparison": "adapterkit.hub.mixing.compare",
    "Conversion": "adapterkit.hub.convert",
    "Diff": "adapterkit.hub.diff",
    "Fidelity": "adapterkit.hub.merge.fidelity",
    "Finding": "adapterkit.hub.findings",
    "Fuse": "adapterkit.hub.compose.blocks",
    "MergeReport": "adapterkit.hub.merge.fidelity",
    "Parallel": "adapterkit.hub.compose.blocks",
    "Report": "adapterkit.hub.findings",
    "Split": "adapterkit.hub.compose.blocks",
    "Stack": "adapterkit.hub.compose.blocks",
    "attach": "adapterkit.hub.compose.attach",
    "attached": "adapterkit.hub.compose.attach",
    "blend": "adapterkit.hub.mixing.blend",
    "check": "adapterkit.hub.check",
    "compare": "adapterkit.hub.mixing.compare",
    "convert": "adapterkit.hub.convert",
    "describe": "adapterkit.hub.describe",
    "diff": "adapterkit.hub.diff",
    "exit_code": "adapterkit.hub.check",
    "extract": "adapterkit.hub.mixing.extract",
    "folder": "adapterkit.hub.locate",
    "load": "adapterkit.hub.load",
    "merge": "adapterkit.hub.merge.merge",
}

__all__ = [
    "Adapter",
    "AdapterInfo",
    "Adapters",
    "Average",
    "BatchSplit",
    "Conversion",
    "Blend",
    "Comparison",
    "Diff",
    "Fidelity",
    "Finding",
    "Fuse",
    "MergeReport",
    "Parallel",
    "Report",
    "Split",
    "Stack",
    "attach",
    "attached",
    "blend",
    "check",
    "compare",
    "convert",
    "describe",
    "diff",
    "exit_code",
    "extract",
    "folder",
    "load",
    "merge",
]


class _Hub(ModuleType):
    """Keeps `hub.check` and `hub.blend` functions: the import system would bind the submodules of
    those names."""

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
