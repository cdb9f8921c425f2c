"""The registry: what is stored. Names, versions, tags, manifests, blobs, lineage.

Public names are imported on first use: whoever needs one error does not pay for a catalog.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterkit.registry.errors import (
        AdapterError,
        AdapterWarning,
        ConflictError,
        DamagedError,
        InvalidError,
        MismatchError,
        NotFoundError,
        ProtocolError,
        RemoteError,
        UnreachableError,
    )
    from adapterkit.registry.filters import Condition, Filter
    from adapterkit.registry.manifest import FileEntry, Manifest, Meaning
    from adapterkit.registry.metrics import parse_metrics
    from adapterkit.registry.problems import Health, Problem
    from adapterkit.registry.records import (
        Added,
        Attachment,
        Edge,
        Event,
        Facts,
        Lineage,
        TagMove,
        Version,
    )
    from adapterkit.registry.refs import (
        PathSource,
        Ref,
        UrlSource,
        parse_base,
        parse_remote,
        parse_source,
        split_weight,
    )
    from adapterkit.registry.registry import Registry
    from adapterkit.registry.repair import Mend, Repaired
    from adapterkit.registry.retention import Retention
    from adapterkit.registry.urls import Url, parse_url

_PLACES = {
    "AdapterError": "errors",
    "AdapterWarning": "errors",
    "Added": "records",
    "Attachment": "records",
    "Condition": "filters",
    "ConflictError": "errors",
    "DamagedError": "errors",
    "Edge": "records",
    "Event": "records",
    "Facts": "records",
    "FileEntry": "manifest",
    "Filter": "filters",
    "Health": "problems",
    "InvalidError": "errors",
    "Lineage": "records",
    "Manifest": "manifest",
    "Meaning": "manifest",
    "Mend": "repair",
    "MismatchError": "errors",
    "NotFoundError": "errors",
    "PathSource": "refs",
    "Problem": "problems",
    "ProtocolError": "errors",
    "Ref": "refs",
    "Registry": "registry",
    "RemoteError": "errors",
    "Repaired": "repair",
    "Retention": "retention",
    "TagMove": "records",
    "UnreachableError": "errors",
    "Url": "urls",
    "UrlSource": "refs",
    "Version": "records",
    "parse_base": "refs",
    "parse_metrics": "metrics",
    "parse_remote": "refs",
    "parse_source": "refs",
    "parse_url": "urls",
    "split_weight": "refs",
}

__all__ = [
    "AdapterError",
    "AdapterWarning",
    "Added",
    "Attachment",
    "Condition",
    "ConflictError",
    "DamagedError",
    "Edge",
    "Event",
    "Facts",
    "FileEntry",
    "Filter",
    "Health",
    "InvalidError",
    "Lineage",
    "Manifest",
    "Meaning",
    "Mend",
    "MismatchError",
    "NotFoundError",
    "PathSource",
    "Problem",
    "ProtocolError",
    "Ref",
    "Registry",
    "RemoteError",
    "Repaired",
    "Retention",
    "TagMove",
    "UnreachableError",
    "Url",
    "UrlSource",
    "Version",
    "parse_base",
    "parse_metrics",
    "parse_remote",
    "parse_source",
    "parse_url",
    "split_weight",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"adapterkit.registry.{_PLACES[name]}"), name)
    globals()[name] = found
    return found
