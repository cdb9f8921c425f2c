"""Attachments: metrics, notes and other facts about a version, kept beside it."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from adapterkit.registry import queries
from adapterkit.registry.change import Change
from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.metrics import parse_metrics
from adapterkit.registry.records import Attachment, Version

METRICS, NOTE = "metrics", "note"
_KIND = re.compile(r"[a-z][a-z0-9-]{0,31}")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._ -]{0,98}[A-Za-z0-9])?")


def entry(key: str, data: bytes) -> Attachment:
    """The attachment of `KIND` or `KIND/NAME`, not yet of a version. Raises InvalidError."""
    kind, mark, name = key.partition("/")
    if not is_key(kind, name) or (mark and not name):
        raise InvalidError(
            f"{key[:120]!r} does not name an attachment", hint="write KIND or KIND/NAME"
        )
    try:
        if kind == METRICS:
            parse_metrics(data)
        if kind == NOTE:
            data.decode()
    except (DamagedError, UnicodeDecodeError) as error:
        raise InvalidError(f"the attachment {key}: {error}") from error
    return Attachment("", kind, name, hashlib.sha256(data).hexdigest(), len(data))


def is_key(kind: str, name: str) -> bool:
    return bool(_KIND.fullmatch(kind)) and (not name or bool(_NAME.fullmatch(name)))


def fields(entry: Attachment) -> dict[str, Any]:
    """As the log and remotes write it."""
    return {
        "kind": entry.kind,
        "name": entry.name,
        "digest": entry.digest,
        "size": entry.size,
    }


def same(one: Attachment, other: Attachment) -> bool:
    return (one.kind, one.name, one.digest) == (other.kind, other.name, other.digest)


def append(change: Change, target: Version, entry: Attachment) -> None:
    """Record it, unless that version has it."""
    have = queries.attachments(change.catalog, target.id)
    if not any(same(each, entry) for each in have):
        payload = {"name": target.name, "version": target.version, "id": target.id}
        change.append("attachment", payload | {"attachment": fields(entry)})
