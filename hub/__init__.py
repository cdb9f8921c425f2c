"""What adapters mean: read, check, attach, load. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.hub.adapter import Adapter, AdapterInfo
    from adapterkit.hub.check import check, exit_code
    from adapterkit.hub.compose.attach import Adapters, attach, attached
    from adapterkit.hub.describe import describe
    from adapterkit.hub.findings import Finding, Report
    from adapterkit.hub.load import load

PLACES = {
    "Adapter": "adapterkit.hub.adapter",
    "AdapterInfo": "adapterkit.hub.adapter",
    "Adapters": "adapterkit.hub.compose.attach",
    "Finding": "adapterkit.hub.findings",
    "Report": "adapterkit.hub.findings",
    "attach": "adapterkit.hub.compose.attach",
    "attached": "adapterkit.hub.compose.attach",
    "check": "adapterkit.hub.check",
    "describe": "adapterkit.hub.describe",
    "exit_code": "adapterkit.hub.check",
    "load": "adapterkit.hub.load",
}

__all__ = [
    "Adapter",
    "AdapterInfo",
    "Adapters",
    "Finding",
    "Report",
    "attach",
    "attached",
    "check",
    "describe",
    "exit_code",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
