"""The registry: what is stored. Names, versions, tags, manifests, blobs, lineage."""

from adapterkit.registry.attaching import parse_metrics
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
from adapterkit.registry.manifest import FileEntry, Manifest, Meaning
from adapterkit.registry.records import (
    Added,
    Attachment,
    Edge,
    Event,
    Facts,
    Lineage,
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
from adapterkit.registry.urls import Url, parse_url

__all__ = [
    "AdapterError",
    "AdapterWarning",
    "Added",
    "Attachment",
    "ConflictError",
    "DamagedError",
    "Edge",
    "Event",
    "Facts",
    "FileEntry",
    "InvalidError",
    "Lineage",
    "Manifest",
    "Meaning",
    "MismatchError",
    "NotFoundError",
    "PathSource",
    "ProtocolError",
    "Ref",
    "Registry",
    "RemoteError",
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
